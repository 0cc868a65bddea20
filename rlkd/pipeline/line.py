"""The left half of the line: prompt → rollout → reward → teacher scores → advantages, one coroutine a prompt.

It calls no collective, but for the turns of sharded frozen models (`rlkd/teachers/lockstep.py`), which are taken in the
thread that waits for an iteration. It knows nothing of the trainer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkd import distributed
from rlkd.algorithms.base import Algorithm
from rlkd.config.schema import Config
from rlkd.data.chat import last_user_text
from rlkd.data.prompts import Stream as Prompts
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import AsyncSampler, Sampler, Sampling
from rlkd.metrics import MetricAccumulator
from rlkd.pipeline import ahead
from rlkd.pipeline.clock import StageClock
from rlkd.pipeline.selection import Selection
from rlkd.pipeline.stages import sampler_stage, teacher_stages
from rlkd.rewards.pool import RewardItem, RewardPool
from rlkd.stream import Pause, Stream, first_error
from rlkd.teachers.lockstep import Lockstep
from rlkd.teachers.teacher import AsyncTeacher, ScoreRequest, Teacher
from rlkd.types import Prompt, Rollout, ScoredRollout

Group = list[ScoredRollout]
"""The completions of one prompt."""


@dataclass(frozen=True, kw_only=True)
class Walked:
    """What one iteration gives."""

    drawn: list[Group]
    """All groups that were sampled, with rewards, in the order of their prompts."""
    trained: list[Group]
    """Those to train on, with scores and advantages too."""
    meter: MetricAccumulator
    clock: StageClock


class Line:
    """The parts of the left half, and the way of a group through them."""

    def __init__(
        self,
        *,
        config: Config,
        algorithm: Algorithm,
        prompts: Prompts,
        policy: Sampler,
        scorers: Mapping[str, Teacher],
        rewards: RewardPool,
        lockstep: Lockstep | None = None,
    ) -> None:
        """
        Args:
            scorers: by name: `teacher`, `reference` where the loss has a KL to it, and what the algorithm adds.
            lockstep: the turns in which those of them that are sharded score.
        """
        self.config = config
        self.algorithm = algorithm
        self.prompts = prompts
        self.policy = policy
        self.scorers = scorers
        self.rewards = rewards
        self.lockstep = lockstep
        self.rollouts: dict[ahead.Key, list[Rollout]] = {}
        """By (iteration, index of the prompt): what was sampled for iterations that are not yet handed out. A walk that
        is repeated, because a server was lost or the run resumed, samples only what is missing."""
        self.restored: dict[ahead.Key, tuple[str, list[dict[str, Any]]]] = {}
        """The same from a checkpoint, with the prompts' ids (`ahead.load`)."""
        self._version = 0
        """The newest published weights."""
        self._awaited: list[tuple[int, Pause[None]]] = []
        """Groups that wait for a version before a teacher that moves scores them."""
        self._walks: set[asyncio.Event] = set()
        """By iteration under way: whether everything is sampled."""
        # With servers, the composition of batches depends on time anyway.
        self.stream = Stream(together=policy.in_process, ahead=config.rollout.max_staleness > 0)
        self._policy: AsyncSampler = sampler_stage(self.stream, policy)
        self._evaluated: AsyncSampler = sampler_stage(self.stream, policy)  # does not queue behind later iterations
        self._scorers: dict[str, AsyncTeacher] = teacher_stages(self.stream, scorers)

    @property
    def teacher(self) -> Teacher | None:
        """The configured teacher."""
        return self.scorers.get("teacher")

    async def group(
        self, prompt: Prompt, iteration: int, index: int, selection: Selection, clock: StageClock
    ) -> tuple[Group, Group | None]:
        """The whole way of one group; `index` is that of its prompt in the iteration.

        Returns: the group with rewards, and the group to train on; None: it is not trained on.
        """
        with clock.stage("rollout"):
            rollouts = await self._rollouts(prompt, iteration, index)
            selection.sampled()
        with clock.stage("reward"):
            group = await self.reward(rollouts) if self.algorithm.uses_rewards else without_reward(rollouts)
        if not await selection.keeps(index, self.algorithm.has_gradient(group, iteration)):
            return group, None
        with clock.stage("teacher"):
            await self._published(iteration)
            return group, self.algorithm.advantages(await self.score(group))

    async def _rollouts(self, prompt: Prompt, iteration: int, index: int) -> list[Rollout]:
        """The completions of a prompt: those that a walk before this one left, or new ones."""
        key = iteration, index
        if key in self.rollouts:
            return self.rollouts[key]
        name, saved = self.restored.pop(key, (None, []))
        if name == prompt.id:
            rollouts = ahead.restored(prompt, saved)
        else:
            rollouts = await self.algorithm.rollout(prompt, self._policy, self._scorers.get("teacher"), iteration)
        check_versions(rollouts, iteration, self.config.rollout.max_staleness)
        self.rollouts[key] = rollouts
        return rollouts

    def forget(self, before: int) -> None:
        """Forget the completions of the iterations before `before`. Other threads may call it."""
        for kept in (self.rollouts, self.restored):
            for key in [key for key in list(kept) if key[0] < before]:  # a copy, since groups come in meanwhile
                kept.pop(key, None)

    def sampled_ahead(self, first: int) -> dict[ahead.Key, list[Rollout]]:
        """What is there of the iterations from `first` on. Other threads may call it."""
        return {key: group for key, group in dict(self.rollouts).items() if key[0] >= first}

    async def walk(self, iteration: int) -> Walked:
        """This rank's share of one iteration, which is a function of the seed and the iteration."""
        count, rank, world = self.config.rollout.prompts, distributed.rank(), distributed.world_size()
        blocks, share = self.config.algorithm.sampling_rounds, count // world
        clock, meter = StageClock(), MetricAccumulator()
        groups: list[asyncio.Task[tuple[Group, Group | None]]] = []

        def draw(block: int) -> int:
            prompts = self.prompts.take(iteration, count, rank, world, block=block, blocks=blocks)
            for index, prompt in enumerate(prompts, len(groups)):
                way = self.group(prompt, iteration, index, selection, clock)
                groups.append(self.stream.start(tasks, (iteration, index), way))
            return len(prompts)

        selection = Selection(self.stream, share, blocks, draw)
        self._walks.add(selection.all_sampled)
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    selection.begin()
        finally:
            selection.all_sampled.set()  # after an error, nothing more will be
            self._walks.discard(selection.all_sampled)
        drawn = [group.result()[0] for group in groups]
        trained = [kept for _, kept in (group.result() for group in groups) if kept is not None]
        meter.mean("groups/no_gradient", selection.no_gradient, len(drawn))
        meter.total("prompts/drawn", len(drawn))
        with clock.stage("teacher"), first_error():
            async with asyncio.TaskGroup() as tasks:
                teacher = self._scorers.get("teacher")
                way = self.algorithm.diagnose(trained, drawn, teacher, iteration, meter)
                self.stream.start(tasks, (iteration, len(groups)), way)
        return Walked(drawn=drawn, trained=trained, meter=meter, clock=clock)

    async def all_sampled(self) -> None:
        """Wait until nothing is being sampled for the iterations under way. Their rewards and scores may go on."""
        for event in list(self._walks):
            await event.wait()

    async def published(self, version: int) -> None:
        """Note that sampler and teachers have the weights of `version`."""
        self._version = version
        ready = [pause for iteration, pause in self._awaited if iteration <= version]
        self._awaited = [(iteration, pause) for iteration, pause in self._awaited if iteration > version]
        for pause in ready:
            pause.end(None)

    async def _published(self, iteration: int) -> None:
        """Wait until a teacher that moves with the student has the weights that `iteration` begins with.

        So its scores are of the same version whether an iteration is sampled ahead or not.
        """
        stale = self.config.rollout.max_staleness > 0 and self._version < iteration
        if stale and any(scorer.moves for scorer in self.scorers.values()):
            pause: Pause[None] = Pause(self.stream)
            self._awaited.append((iteration, pause))
            await pause.wait()

    async def answers(self, prompt: Prompt, n: int, sampling: Sampling) -> Group:
        """n completions of a prompt with their rewards, for an evaluation."""
        return await self.reward(await self._evaluated.sample(prompt, n=n, iteration=0, sampling=sampling))

    async def reward(self, rollouts: Sequence[Rollout]) -> Group:
        """Each rollout with its reward, computed in the worker processes."""
        items = [reward_item(rollout.prompt, self.algorithm.text(rollout)) for rollout in rollouts]
        results = await asyncio.wrap_future(self.rewards.submit(items))
        return [
            ScoredRollout(
                rollout=rollout,
                reward=result.reward,
                reward_parts=result.parts,
                error=result.error,
                feedback=result.feedback,
            )
            for rollout, result in zip(rollouts, results, strict=True)
        ]

    async def score(self, group: Group) -> Group:
        """Each rollout with the scores of every scorer: the teacher, the reference, and the algorithm's own."""
        rows = list(group)
        for name, scorer in self._scorers.items():
            prompts = [self.algorithm.scorer_prompt(name, scored, group) for scored in group]
            asked = [i for i, prompt in enumerate(prompts) if prompt is not None]
            questions = [
                ScoreRequest(prompts[i] or (), r.token_ids, ids=r.top_ids, meta=r.prompt.meta)
                for i, r in ((i, rows[i].rollout) for i in asked)
            ]
            scores_of = await scorer.score(questions, self.algorithm.scorer_signal(name))
            for i, scores in zip(asked, scores_of, strict=True):
                rows[i] = rows[i].with_scores(name, scores)
        return rows


def reward_item(prompt: Prompt, completion: str) -> RewardItem:
    """What the rewards read of a completion."""
    return RewardItem(
        completion=completion,
        answer=prompt.answer,
        prompt=last_user_text(prompt.messages),
        messages=prompt.messages,
        meta=dict(prompt.meta),
    )


def without_reward(rollouts: Sequence[Rollout]) -> Group:
    """The group where the algorithm uses no rewards."""
    return [ScoredRollout(rollout=rollout, reward=None) for rollout in rollouts]


def check_versions(rollouts: Sequence[Rollout], iteration: int, max_staleness: int) -> None:
    """Every token must come from the weights of this iteration, or at most `max_staleness` versions before.

    Raises: RunStopped naming both versions.
    """
    for span in (span for rollout in rollouts for span in rollout.weight_versions):
        if not iteration - max_staleness <= span.version <= iteration:
            raise RunStopped(
                f"iteration {iteration + 1}: expected samples of weight version {iteration} "
                f"(rollout.max_staleness is {max_staleness}), got version {span.version}; check what else "
                "publishes to the sampler"
            )
