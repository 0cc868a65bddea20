"""The left half of the line: prompt → rollout → reward → teacher scores → advantages, one coroutine a prompt.

It calls no collective and knows nothing of the trainer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlkd import distributed
from rlkd.algorithms.base import Algorithm
from rlkd.config.schema import Config
from rlkd.data.chat import last_user_text
from rlkd.data.prompts import PromptStream
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import AsyncSampler, Sampler, Sampling
from rlkd.metrics import MetricAccumulator
from rlkd.pipeline.clock import StageClock
from rlkd.pipeline.rollout_files import write_rollouts
from rlkd.pipeline.selection import Selection
from rlkd.pipeline.stages import sampler_stage, teacher_stages
from rlkd.rewards.pool import RewardItem, RewardPool
from rlkd.storage.disk_errors import writing
from rlkd.stream import Stream, first_error
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
        prompts: PromptStream,
        policy: Sampler,
        scorers: Mapping[str, Teacher],
        rewards: RewardPool,
    ) -> None:
        """
        Args:
            scorers: by name: `teacher`, `reference` where the loss has a KL to it, and what the algorithm adds.
        """
        self.config = config
        self.algorithm = algorithm
        self.prompts = prompts
        self.policy = policy
        self.scorers = scorers
        self.rewards = rewards
        # With servers, the composition of batches depends on time anyway.
        self.stream = Stream(together=policy.in_process)
        self._policy: AsyncSampler = sampler_stage(self.stream, policy)
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
            rollouts = await self.algorithm.rollout(prompt, self._policy, self._scorers.get("teacher"), iteration)
            check_versions(rollouts, iteration, self.config.rollout.max_staleness)
        with clock.stage("reward"):
            group = await self.reward(rollouts) if self.algorithm.uses_rewards else without_reward(rollouts)
        if not await selection.keeps(index, self.algorithm.has_gradient(group, iteration)):
            return group, None
        with clock.stage("teacher"):
            return group, self.algorithm.advantages(await self.score(group))

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
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                selection.begin()
        drawn = [group.result()[0] for group in groups]
        trained = [kept for _, kept in (group.result() for group in groups) if kept is not None]
        meter.mean("groups/no_gradient", selection.no_gradient, len(drawn))
        meter.total("prompts/drawn", len(drawn))
        with clock.stage("teacher"), first_error():
            async with asyncio.TaskGroup() as tasks:
                teacher = self._scorers.get("teacher")
                way = self.algorithm.diagnose(trained, drawn, teacher, iteration, meter)
                self.stream.start(tasks, (iteration, len(groups)), way)
        with clock.stage("dump"):
            await self.stream.in_thread(lambda: self._write(trained, iteration))
        return Walked(drawn=drawn, trained=trained, meter=meter, clock=clock)

    def _write(self, groups: Sequence[Group], iteration: int) -> None:
        with writing(f"the rollouts of iteration {iteration + 1}"):
            write_rollouts(self.config, self.algorithm.tokenizer, groups, iteration)

    async def answers(self, prompt: Prompt, n: int, sampling: Sampling) -> Group:
        """n completions of a prompt with their rewards, for an evaluation."""
        return await self.reward(await self._policy.sample(prompt, n=n, iteration=0, sampling=sampling))

    async def reward(self, rollouts: Sequence[Rollout]) -> Group:
        """Each rollout with its reward, computed in the worker processes."""
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
