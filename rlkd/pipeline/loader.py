"""One Batch per iteration: runs the left half and restarts lost servers. The trainer's interface to the left half."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlkd import distributed
from rlkd.algorithms.base import Algorithm
from rlkd.config.schema import Config, NoTeacherConfig
from rlkd.console import phase
from rlkd.data.heldout import part_of
from rlkd.data.mixture import load_training_data
from rlkd.data.prompts import PromptStream, Stream
from rlkd.data.sources import PromptList
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampler, eos_ids
from rlkd.models.weights import Published
from rlkd.pipeline import ahead
from rlkd.pipeline.balance import balanced
from rlkd.pipeline.build import build_line, build_reference
from rlkd.pipeline.collate import collate, describe
from rlkd.pipeline.line import Group, Walked
from rlkd.pipeline.probe import Probe
from rlkd.pipeline.rollout_files import write_rollouts
from rlkd.servers.client import ServerLost
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import save_data
from rlkd.teachers.lockstep import Lockstep
from rlkd.teachers.parity import check_parity
from rlkd.teachers.teacher import Teacher
from rlkd.types import Batch

T = TypeVar("T")

_MAX_ATTEMPTS = 5
"""How often an iteration is tried: one whose requests crash every server would otherwise be retried without end."""

ENDLESS = 10**9
"""`__len__`: larger than any run. With the true length, Lightning would store "last batch" in a finished run's
checkpoint, and resuming it with more iterations would train nothing."""


class Owner(Protocol):
    """What has an algorithm: `PolicyModule`, which this file does not import."""

    algorithm: Algorithm


class RolloutLoader:
    """One Batch per iteration, sampled by the weights that were just published, or `rollout.max_staleness` ahead.

    A plain sized iterable, not a torch DataLoader. Its length matters: without one, Lightning fetches a batch ahead,
    which would be sampled with old weights. Its only state is the iteration, and what was sampled ahead.
    """

    def __init__(self, config: Config, algorithm: Algorithm | Owner, source: PromptList | None = None):
        """
        Args:
            algorithm: what the left half asks, or the module that owns it.
            source: the prompts; None: those of data.path that are trained on.
        """
        if not isinstance(algorithm, Algorithm):
            algorithm = algorithm.algorithm
        self.config = config
        self.algorithm = algorithm
        self.iteration = 0
        self.made = 0.0
        """When the last batch was complete."""
        self.tokenizer = algorithm.tokenizer
        if source is None:
            ends = eos_ids(config.model.path, config.model.trust_remote_code)
            data = load_training_data(config.data, self.tokenizer, ends, part_of(config, held_out=False))
            if distributed.rank() == 0:
                for note in data.notes:
                    print(f"data: {note}", flush=True)
            self.data = data.identity
            prompts: Stream = data.stream(config.run.seed)
        else:
            self.data = source.identity
            prompts = PromptStream(source, seed=config.run.seed)
        self.line = build_line(config, algorithm, prompts)
        self._probe = Probe(self.line) if config.rollout.max_staleness > 0 else None
        self._file: Future[None] | None = None
        """The rollouts of the last batch, on their way to the disk."""
        self._walks: dict[int, Future[Walked]] = {}
        """By iteration: what is under way, or was sampled ahead and not yet trained on."""

    @property
    def policy(self) -> Sampler:
        """What samples for the student."""
        return self.line.policy

    def open(self) -> None:
        """Load models, connect to or start servers, start reward workers. Every rank calls it, once."""
        parts: dict[str, Sampler | Teacher] = {"policy": self.line.policy, **self.line.scorers}
        for part in parts.values():
            part.start()
        # Servers first: vLLM would count a model loaded here meanwhile, on the same GPU, as its own (`Seat.turn`).
        for name, part in sorted(parts.items(), key=lambda item: item[1].in_process):
            what = f"loading the {name}" if part.in_process else f"waiting for servers: {name}"
            with phase(what, self.config.log.progress):
                part.open()
        if len(set(distributed.gather(self.data.digest))) > 1:
            raise RunStopped(
                f"data.path: expected the same rows in the same order of {self.config.data.path} on every rank, got "
                "others; copy one file to all nodes, or let your own class depend on nothing but the split"
            )
        distributed.on_every_rank(self.line.rewards.open)  # a module may be missing on one node only

    def check_parity(self) -> None:
        """The start-up check of `teacher.check_parity`. The sampler must hold the untrained student."""
        teacher = self.config.teacher
        if isinstance(teacher, NoTeacherConfig) or not teacher.check_parity or self.iteration > 0:
            return
        prompts = self.line.prompts.take(0, self.config.rollout.prompts, distributed.rank(), distributed.world_size())
        start = build_reference(self.config, Lockstep() if self.config.trainer.shard_frozen else None)
        start.open()
        gaps = check_parity(self.config, prompts, self.line.policy, start, self.line.teacher)
        start.close()
        if distributed.rank() == 0:
            print("parity: " + ", ".join(f"{name} within {gap:.2g} nats" for name, gap in gaps.items()), flush=True)

    def close(self) -> None:
        """Stop everything that `open` started, once the rollouts of the last batch are in their file."""
        if self._file is not None:
            wait([self._file])
        self.line.stream.close()
        self._walks = {}
        self.line.rewards.close()
        for scorer in self.line.scorers.values():
            scorer.close()
        self.line.policy.close()

    def publish(self, student: Published, version: int) -> None:
        """Give the sampler, and a teacher that follows the student, its weights after `version` iterations.

        A collective.
        """
        self.line.policy.publish(student, version)
        for scorer in self.line.scorers.values():
            if scorer.follows:
                scorer.publish(student.weights(), version)
        self.line.stream.submit(self.line.published(version)).result()
        if self._probe is not None and version < self.config.run.iterations:
            self._probe.ask(version)
        if self.config.publishes_in_flight:
            self._begin_ahead(version, version + self.config.rollout.max_staleness)

    def join(self) -> None:
        """Wait until nothing is being sampled ahead, so that no completion mixes two versions.

        With `rollout.in_flight` they may, and nothing is waited for.
        """
        if self._walks and not self.config.publishes_in_flight:
            self.line.stream.submit(self.line.all_sampled()).result()

    def save_rollouts(self, folder: Path) -> None:
        """Save this rank's completions that were sampled ahead into a checkpoint's folder."""
        ahead.save(self.line.sampled_ahead(self.iteration), folder)

    def save(self, folder: Path) -> None:
        """Save into a checkpoint's folder what a resumed run cannot recompute and all ranks have."""
        save_data(asdict(self.data), folder)
        for scorer in self.line.scorers.values():
            scorer.save(folder)

    def restore(self, folder: Path) -> None:
        """Restore what `save` and `save_rollouts` wrote. The iteration must be restored already."""
        self.line.restored = distributed.on_every_rank(lambda: ahead.load(folder))
        for scorer in self.line.scorers.values():
            scorer.restore(folder, self.iteration)

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self.batch(self.iteration)
            self.iteration += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]

    def batch(self, iteration: int) -> Batch:
        """This rank's share of iteration `iteration` (0 is the first), with its metrics in `metrics`.

        Its rows may be of groups that another rank sampled (`balanced`). The metrics of rewards, lengths and errors
        cover everything that this rank sampled, even if only part of it is trained on.
        """
        staleness = self.config.rollout.max_staleness
        self.line.forget(iteration)
        started = time.perf_counter()
        walked, probe, sampled, ready = self.with_servers(lambda: self._waited(iteration))
        self.line.policy.sleep()  # all ranks have their completions
        together = time.perf_counter()
        if staleness == 0:
            self.line.forget(iteration + 1)  # if it is asked for again, the weights may be others
        self._begin_ahead(iteration + 1, iteration + staleness)
        metrics = describe(walked.drawn, iteration, self.config.reward.correct_at)
        metrics.merge(walked.meter)
        for stage, seconds in walked.clock.seconds(started, sampled).items():
            metrics.maximum(f"time/{stage}", seconds)
        metrics.maximum("time/probe", ready - sampled)
        metrics.maximum("time/wait", together - ready)
        layers = {
            name: scorer.layers()
            for name, scorer in self.line.scorers.items()
            if self.algorithm.scorer_signal(name).tier == "hidden"
        }
        trained = balanced(walked.trained, self.config.trainer.share_prompts, metrics)
        batch = collate(
            trained,
            iteration,
            layers,
            scorers=tuple(self.line.scorers),
            masks=self.algorithm.mask_names,
            mask_failed=self.algorithm.masks_failed,
            probe=probe,
            metrics=metrics,
        )
        if self.algorithm.needs_rewards:
            check_errors(walked.drawn, self.config, f"iteration {iteration + 1}")
        self._file = self.line.stream.submit(self._write(trained, iteration))
        self.made = time.perf_counter()
        metrics.maximum("time/collate", self.made - together)
        return batch

    async def _write(self, groups: list[Group], iteration: int) -> None:
        def act() -> None:
            with writing(f"the rollouts of iteration {iteration + 1}"):
                write_rollouts(self.config, self.tokenizer, groups, iteration)

        await self.line.stream.in_thread(act)

    def written(self) -> None:
        """Wait until the rollouts of the last batch are in their file. A collective. Raises: RunStopped."""
        distributed.on_every_rank(lambda: None if self._file is None else self._file.result())
        self._file = None

    def _waited(self, iteration: int) -> tuple[Walked, Batch | None, float, float]:
        """(the iteration, its probe, and the times at which they were there)."""
        walked = self.walk(iteration)
        sampled = time.perf_counter()
        probe = None if self._probe is None else self._probe.batch(iteration)
        return walked, probe, sampled, time.perf_counter()

    def walk(self, iteration: int) -> Walked:
        """What the left half gives for one iteration on this rank. Calls no collective, but for turns of `lockstep`."""
        self._begin(iteration)
        turn = None if self.line.lockstep is None else self.line.lockstep.turn
        try:
            return self.line.stream.result(self._walks[iteration], turn)
        finally:
            del self._walks[iteration]  # after an error, the iteration may be tried again

    def _begin(self, iteration: int) -> None:
        """Begin the iteration, unless it is under way."""
        if iteration not in self._walks:
            self._walks[iteration] = self.line.stream.submit(self.line.walk(iteration))

    def _begin_ahead(self, first: int, last: int) -> None:
        """Begin the iterations from `first` to `last`, or to the end of the run."""
        for iteration in range(first, min(last + 1, self.config.run.iterations)):
            self._begin(iteration)

    def _begin_again(self) -> None:
        """Begin the iterations ahead again that ended when the servers were lost; otherwise each would report it."""
        for iteration, walk in list(self._walks.items()):
            if walk.done() and isinstance(walk.exception(), ServerLost):
                del self._walks[iteration]
                self._begin(iteration)

    def with_servers(self, act: Callable[[], T]) -> T:
        """Call `act`, which samples and, but for what `walk` does, calls no collective. A collective.

        Returns: its result on this rank.

        If any rank loses the policy's servers meanwhile, they are restarted and given the weights again, and all ranks
        call `act` again. What it draws is a function of the seed and the iteration, so the result is the same; the
        completions of an iteration that were there already are kept.

        Raises: RunStopped on all ranks if servers do not come back, or are lost too many times.
        """
        for tried in range(1, 1 + _MAX_ATTEMPTS):
            lost: list[str] = []

            def attempt(lost: list[str] = lost) -> T | None:
                try:
                    return act()
                except ServerLost as error:
                    lost.append(str(error))
                    return None

            result = distributed.on_every_rank(attempt)
            if not distributed.all_reduce([float(bool(lost))], "max")[0]:
                return result  # type: ignore[return-value]
            if tried < _MAX_ATTEMPTS:
                self.line.policy.recover()
                self._begin_again()
        raise RunStopped(
            f"the policy's servers were lost {_MAX_ATTEMPTS} times in the same iteration; the last error: "
            + (lost[0] if lost else "on another rank")
        )


def check_errors(groups: list[Group], config: Config, where: str) -> None:
    """Stop the run on all ranks if too many rewards failed. A collective.

    Raises: RunStopped above `reward.max_error_rate`, with the most frequent error of this rank.
    """
    errors = [scored.error for group in groups for scored in group if scored.error is not None]
    failed, total = distributed.all_reduce([float(len(errors)), float(sum(len(group) for group in groups))])
    if failed / total > config.reward.max_error_rate:
        most = Counter(errors).most_common(1)
        raise RunStopped(
            f"{where}: {failed:.0f} of {total:.0f} rewards failed, more than "
            f"reward.max_error_rate = {config.reward.max_error_rate}; " + (f"most often: {most[0][0]}" if most else "")
        )
