"""The left half of the line: prompts → rollout → reward → teacher scores → advantages → Batch."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rlkd import distributed
from rlkd.config.schema import Config, NoTeacher
from rlkd.data.chat import last_user_text
from rlkd.data.prompts import PromptStream
from rlkd.data.sources import load_source
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import end_ids
from rlkd.metrics import Meter
from rlkd.pipeline.build import build_reference, build_sampler, build_teacher
from rlkd.pipeline.collate import collate, describe
from rlkd.rewards.pool import RewardItem, RewardPool
from rlkd.servers.client import ServerLost
from rlkd.storage import atomic
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import save_data
from rlkd.teachers.parity import check_parity
from rlkd.teachers.self_teacher import SelfTeacher
from rlkd.teachers.teacher import Question
from rlkd.training.module import PolicyModule
from rlkd.types import Batch, Rollout, ScoredRollout, Signal

T = TypeVar("T")

_BEGINNINGS = 5
"""How often an iteration is begun: one whose requests end every server would do so for ever."""

Groups = list[list[ScoredRollout]]
"""One list a prompt."""

ENDLESS = 10**9
"""`__len__`: larger than any run. With the true length, Lightning would store "last batch" in a finished run's
checkpoint, and resuming it with more iterations would train nothing."""


class RolloutLoader:
    """One Batch an iteration, made when it is asked for: by the weights that were just published.

    A plain sized iterable, not a torch DataLoader. Its length matters: without one, Lightning fetches a batch ahead,
    which would be sampled by old weights. Its whole state is the iteration.
    """

    def __init__(self, config: Config, algorithm: PolicyModule):
        self.config = config
        self.algorithm = algorithm
        self.iteration = 0
        self.tokenizer = algorithm.tokenizer
        ends = end_ids(config.model.path, config.model.trust_remote_code)
        source = load_source(config.data, self.tokenizer, ends=ends)
        self.data = source.identity
        if distributed.rank() == 0:
            for note in source.notes:
                print(f"data: {note}", flush=True)
        self.prompts = PromptStream(source, seed=config.run.seed)
        self.policy = build_sampler(config)
        self.teacher = build_teacher(config, self.policy) if algorithm.uses_teacher else None
        # With adapters the student itself holds its start, and scores as the reference where it is trained.
        apart = algorithm.needs_reference and config.model.lora is None
        self.reference = build_reference(config) if apart else None
        self.rewards = RewardPool(config.reward)

    def open(self) -> None:
        """Load models, connect to or start servers, start reward workers. Every rank calls it, once."""
        parts = [part for part in (self.policy, self.teacher, self.reference) if part is not None]
        for part in parts:
            part.start()
        for part in parts:
            part.open()
        distributed.on_every_rank(self.rewards.open)  # a module may be absent on one node alone

    def check_parity(self) -> None:
        """The start-up check that `teacher.check_parity` asks for; wants the untrained student in the sampler."""
        if isinstance(self.config.teacher, NoTeacher) or not self.config.teacher.check_parity or self.iteration > 0:
            return
        prompts = self.prompts.take(0, self.config.rollout.prompts, distributed.rank(), distributed.world_size())
        start = build_reference(self.config)
        start.open()
        gaps = check_parity(self.config, prompts, self.policy, start, self.teacher)
        start.close()
        if distributed.rank() == 0:
            print("parity: " + ", ".join(f"{name} within {gap:.2g} nats" for name, gap in gaps.items()), flush=True)

    def close(self) -> None:
        """Stop all that `open` started."""
        self.rewards.close()
        for scorer in (self.teacher, self.reference):
            if scorer is not None:
                scorer.close()
        self.policy.close()

    def publish(self, weights: Mapping[str, Tensor], version: int, served: Mapping[str, Tensor] | None = None) -> None:
        """Give the sampler, and a teacher that follows the student, the weights after `version` iterations.

        A collective.

        Args:
            weights: full, unsharded, names in memory; nothing where servers sample and no teacher follows.
            served: what servers get (`weight_sync.publish`); None: the sampler in this process gets `weights`.
        """
        self.policy.publish(weights if served is None else served, version)
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.publish(weights, version)

    @property
    def teacher_follows(self) -> bool:
        """Whether a teacher in this process takes over what is published."""
        return isinstance(self.teacher, SelfTeacher) and self.teacher.weights != "fixed"

    def save(self, folder: Path) -> None:
        """Keep in a checkpoint's folder what a resumed run cannot recompute."""
        save_data(asdict(self.data), folder)
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.save(folder)

    def restore(self, folder: Path) -> None:
        """Be as `save` left it; the iteration is restored already."""
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.restore(folder, self.iteration)

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
        """This rank's share of iteration `iteration` (0 is the first), with its figures in `metrics`.

        Rewards, lengths and errors are those of all that was sampled, also where only some of it is trained on.
        """
        drawn, groups, clock = self.with_servers(lambda: self._line(iteration))
        clock.lap("time/wait")
        wants_layers = self.teacher is not None and self.algorithm.signal.tier == "hidden"
        layers = self.teacher.layers() if self.teacher and wants_layers else ()
        batch = collate(groups, iteration, layers, mask_failed=self.algorithm.masks_failed)
        batch.metrics.merge(describe(drawn, iteration, self.config.reward.correct_at))
        batch.metrics.merge(clock.meter)
        if self.algorithm.needs_rewards:
            check_errors(drawn, self.config, f"iteration {iteration + 1}")
        return batch

    def with_servers(self, act: Callable[[], T]) -> T:
        """What `act`, which samples but holds no collective, returns on this rank. A collective.

        When the policy's servers are lost meanwhile on any rank, they are brought back and given the weights again, and
        `act` begins anew on all ranks: whatever it draws is a function of seed and iteration, so nothing is another.

        Raises: RunStopped on all ranks when servers do not come back, or are lost again and again.
        """
        for begun in range(1, 1 + _BEGINNINGS):
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
            if begun < _BEGINNINGS:
                self.policy.recover()
        raise RunStopped(
            f"the policy's servers were lost {_BEGINNINGS} times over the same iteration; at last: "
            + (lost[0] if lost else "on another rank")
        )

    def _line(self, iteration: int) -> tuple[Groups, Groups, Clock]:
        """prompts → rollout → reward → teacher scores → advantages, for this rank; no collectives.

        Returns: all groups that were sampled, with rewards, those to train on, and what took how long.
        """
        clock = Clock()
        drawn, chosen = self._draw(iteration, clock)
        groups = self.score(chosen)
        clock.lap("time/teacher")
        groups = [self.algorithm.advantages(group) for group in groups]
        self.algorithm.diagnose(groups, self.teacher, iteration, clock.meter)
        with writing(f"the rollouts of iteration {iteration + 1}"):
            self.dump(groups, iteration)
        clock.lap("time/dump")
        return drawn, groups, clock

    def _draw(self, iteration: int, clock: Clock) -> tuple[Groups, Groups]:
        """Blocks of prompts → rollout → reward, until enough groups carry a gradient or the rounds are used up.

        Dynamic sampling, DAPO, arXiv 2503.14476, Eq. 11. This rank's share stays the same size: groups that carry
        none fill it up. A block is a function of the iteration, so that a resumed run draws the same ones.

        Returns: all groups that were sampled, and those to train on, in the order of their prompts.
        """
        count, rank, world = self.config.rollout.prompts, distributed.rank(), distributed.world_size()
        rounds, share = self.config.algorithm.sampling_rounds, count // world
        drawn: Groups = []
        barren: list[bool] = []
        for block in range(rounds):
            prompts = self.prompts.take(iteration, count, rank, world, block=block, blocks=rounds)
            rollouts = self.algorithm.rollout(prompts, self.policy, self.teacher, iteration)
            check_versions(rollouts, iteration, self.config.rollout.max_staleness)
            clock.lap("time/rollout")
            if self.algorithm.uses_rewards:
                groups = self.reward(rollouts)
            else:
                groups = [[ScoredRollout(rollout=rollout, reward=None) for rollout in group] for group in rollouts]
            clock.lap("time/reward")
            drawn += groups
            barren += [not self.algorithm.carries_gradient(group, iteration) for group in groups]
            if barren.count(False) >= share:
                break
        clock.meter.mean("groups/no_gradient", sum(barren), len(barren))
        clock.meter.total("prompts/drawn", len(drawn))
        chosen = sorted(range(len(drawn)), key=lambda i: barren[i])[:share]
        return drawn, [drawn[i] for i in sorted(chosen)]

    def reward(self, groups: Sequence[Sequence[Rollout]]) -> list[list[ScoredRollout]]:
        """Each rollout with its reward, computed in the worker processes."""
        rollouts = [rollout for group in groups for rollout in group]
        items = [
            RewardItem(
                completion=self.algorithm.text(rollout),
                answer=rollout.prompt.answer,
                prompt=last_user_text(rollout.prompt.messages),
                messages=rollout.prompt.messages,
                meta=dict(rollout.prompt.meta),
            )
            for rollout in rollouts
        ]
        scored = iter(
            [
                ScoredRollout(
                    rollout=rollout,
                    reward=result.reward,
                    reward_parts=result.parts,
                    error=result.error,
                    feedback=result.feedback,
                )
                for rollout, result in zip(rollouts, self.rewards.score(items), strict=True)
            ]
        )
        return [[next(scored) for _ in group] for group in groups]

    def score(self, groups: Sequence[Sequence[ScoredRollout]]) -> list[list[ScoredRollout]]:
        """Each rollout with the log-probs of the teacher, and of the reference, where the algorithm asks for them."""
        rows = [scored for group in groups for scored in group]
        if self.teacher is not None:
            prompts = [self.algorithm.teacher_prompt(scored, group) for group in groups for scored in group]
            asked = [i for i, prompt in enumerate(prompts) if prompt is not None]
            questions = [
                Question(prompts[i] or (), r.token_ids, ids=r.top_ids, meta=r.prompt.meta)
                for i, r in ((i, rows[i].rollout) for i in asked)
            ]
            for i, scores in zip(asked, self.teacher.score(questions, self.algorithm.signal), strict=True):
                rows[i] = replace(rows[i], teacher=scores)
        if self.reference is not None:
            questions = [Question(s.rollout.prompt.token_ids, s.rollout.token_ids) for s in rows]
            scores_of = self.reference.score(questions, Signal())
            rows = [replace(s, reference=r) for s, r in zip(rows, scores_of, strict=True)]
        scored = iter(rows)
        return [[next(scored) for _ in group] for group in groups]

    def dump(self, groups: Sequence[Sequence[ScoredRollout]], iteration: int) -> None:
        """All rollouts of this rank as JSONL, in the run directory."""
        every = self.config.log.rollouts_every
        if not every or iteration % every:
            return
        folder = Path(self.config.run_dir, "rollouts")
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for scored in (s for group in groups for s in group):
            rollout = scored.rollout
            line = {
                "iteration": iteration + 1,
                "id": rollout.prompt.id,
                "prompt": self.algorithm.decoded(rollout.prompt.token_ids),
                "completion": self.algorithm.decoded(rollout.token_ids),
                "answer": rollout.prompt.answer,
                "reward": scored.reward,
                "reward_parts": dict(scored.reward_parts),
                "error": scored.error,
                "advantage": scored.advantage,
                "finish_reason": rollout.finish_reason,
                "weight_version": rollout.oldest_version,
                "segments": [[part.author, part.start, part.end] for part in rollout.segments],
                "token_ids": list(rollout.token_ids),
                "logprobs": list(rollout.logprobs),
                "teacher_logprobs": None if scored.teacher is None else list(scored.teacher.logprobs),
            }
            lines.append(json.dumps(line) + "\n")
        name = f"{iteration + 1:06d}-rank{distributed.rank()}.jsonl"
        atomic.write(folder / name, "".join(lines).encode())


class Clock:
    """Seconds between laps, added up by name; each figure is the slowest rank's."""

    def __init__(self) -> None:
        self.meter = Meter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self.meter.maximum(name, self._seconds[name])
        self._last = now


def check_versions(groups: Sequence[Sequence[Rollout]], iteration: int, max_staleness: int) -> None:
    """Every token must come from the weights of this iteration, or at most `max_staleness` versions before.

    Raises: RunStopped naming both versions.
    """
    for rollout in (r for group in groups for r in group):
        for span in rollout.weight_versions:
            if not iteration - max_staleness <= span.version <= iteration:
                raise RunStopped(
                    f"iteration {iteration + 1} wants samples by weight version {iteration}, but the sampler used "
                    f"version {span.version} (rollout.max_staleness is {max_staleness})"
                )


def check_errors(groups: Sequence[Sequence[ScoredRollout]], config: Config, where: str) -> None:
    """Stop the run when too many rewards failed, on all ranks together. A collective.

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
