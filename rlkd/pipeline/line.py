"""The left half of the line: prompts → rollout → reward → teacher scores → advantages, for one rank.

It calls no collective and knows nothing of the trainer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlkd import distributed
from rlkd.algorithms.base import Algorithm
from rlkd.config.schema import Config
from rlkd.data.chat import last_user_text
from rlkd.data.prompts import PromptStream
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampler
from rlkd.metrics import MetricAccumulator
from rlkd.rewards.pool import RewardItem, RewardPool
from rlkd.teachers.teacher import ScoreRequest, Teacher
from rlkd.types import Rollout, ScoredRollout

Groups = list[list[ScoredRollout]]
"""One list per prompt."""


class PhaseTimer:
    """Seconds between laps, added up by name; each metric is that of the slowest rank."""

    def __init__(self) -> None:
        self.meter = MetricAccumulator()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap to `name`."""
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self.meter.maximum(name, self._seconds[name])
        self._last = now


@dataclass(frozen=True, kw_only=True)
class Line:
    """The parts of the left half, from prompts to rollouts with advantages."""

    config: Config
    algorithm: Algorithm
    prompts: PromptStream
    policy: Sampler
    scorers: Mapping[str, Teacher]
    """By name: `teacher`, `reference` where the loss has a KL to it, and what the algorithm adds."""
    rewards: RewardPool

    @property
    def teacher(self) -> Teacher | None:
        """The configured teacher."""
        return self.scorers.get("teacher")

    def walk(self, iteration: int, clock: PhaseTimer) -> tuple[Groups, Groups]:
        """This rank's share of one iteration, which is a function of the seed and the iteration.

        Returns: all groups that were sampled, with rewards, and those to train on, with scores and advantages too.
        """
        drawn, chosen = self.draw(iteration, clock)
        scored = self.score(chosen)
        clock.lap("time/teacher")
        credited = [self.algorithm.advantages(group) for group in scored]
        self.algorithm.diagnose(credited, self.teacher, iteration, clock.meter)
        return drawn, credited

    def draw(self, iteration: int, clock: PhaseTimer) -> tuple[Groups, Groups]:
        """Sample blocks of prompts and reward them, until enough groups have a gradient or the rounds are used up.

        Dynamic sampling, DAPO, arXiv 2503.14476, Eq. 11. This rank's share stays the same size: groups without
        a gradient fill it up. A block is a function of the iteration, so that a resumed run draws the same ones.

        Returns: all groups that were sampled, and those to train on, in the order of their prompts.
        """
        count, rank, world = self.config.rollout.prompts, distributed.rank(), distributed.world_size()
        rounds, share = self.config.algorithm.sampling_rounds, count // world
        drawn: Groups = []
        no_gradient: list[bool] = []
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
            no_gradient += [not self.algorithm.has_gradient(group, iteration) for group in groups]
            if no_gradient.count(False) >= share:
                break
        clock.meter.mean("groups/no_gradient", sum(no_gradient), len(no_gradient))
        clock.meter.total("prompts/drawn", len(drawn))
        chosen = sorted(range(len(drawn)), key=lambda i: no_gradient[i])[:share]
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
        """Each rollout with the scores of every scorer: the teacher, the reference, and the algorithm's own."""
        rows = [scored for group in groups for scored in group]
        for name, scorer in self.scorers.items():
            prompts = [self.algorithm.scorer_prompt(name, scored, group) for group in groups for scored in group]
            asked = [i for i, prompt in enumerate(prompts) if prompt is not None]
            questions = [
                ScoreRequest(prompts[i] or (), r.token_ids, ids=r.top_ids, meta=r.prompt.meta)
                for i, r in ((i, rows[i].rollout) for i in asked)
            ]
            scores_of = scorer.score(questions, self.algorithm.scorer_signal(name))
            for i, scores in zip(asked, scores_of, strict=True):
                rows[i] = rows[i].with_scores(name, scores)
        scored = iter(rows)
        return [[next(scored) for _ in group] for group in groups]


def check_versions(groups: Sequence[Sequence[Rollout]], iteration: int, max_staleness: int) -> None:
    """Every token must come from the weights of this iteration, or at most `max_staleness` versions before.

    Raises: RunStopped naming both versions.
    """
    for rollout in (r for group in groups for r in group):
        for span in rollout.weight_versions:
            if not iteration - max_staleness <= span.version <= iteration:
                raise RunStopped(
                    f"iteration {iteration + 1}: expected samples of weight version {iteration} "
                    f"(rollout.max_staleness is {max_staleness}), got version {span.version}; check what else "
                    "publishes to the sampler"
                )
