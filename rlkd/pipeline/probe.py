"""A few completions by the newest weights, on which sampler and trainer are compared when a batch is by older ones."""

from __future__ import annotations

from concurrent.futures import Future

from rlkd import distributed
from rlkd.generation.sampler import Sampling
from rlkd.pipeline.collate import collate
from rlkd.pipeline.line import Line, without_reward
from rlkd.types import Batch, Rollout

PROMPTS, TOKENS = 16, 2
"""The size of a probe on each rank: enough tokens to notice other weights, in few steps, since the trainer waits."""

FIRST, EVERY = 6, 10
"""The first iterations and every tenth one have a probe: a trainer that has all its rollouts waits for it."""


def is_due(iteration: int) -> bool:
    """Whether `iteration` has a probe, which is a function of it alone, so that a resumed run has the same ones."""
    return iteration < FIRST or iteration % EVERY == 0


class Probe:
    """Samples the probes, `Batch.probe`."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._asked: Future[list[list[Rollout]]] | None = None

    def ask(self, iteration: int) -> None:
        """Ask servers now, before the requests that come later. The weights of `iteration` are published."""
        if is_due(iteration) and not self._line.policy.in_process:
            self._asked = self._line.stream.submit(self._line.stream.in_thread(lambda: self._sample(iteration)))

    def batch(self, iteration: int) -> Batch | None:
        """The probe of an iteration that has one. Raises: ServerLost; it is then sampled anew by the next call."""
        if not is_due(iteration):
            return None
        asked, self._asked = self._asked, None
        groups = self._sample(iteration) if asked is None else asked.result()
        return collate([without_reward(group) for group in groups], iteration)

    def _sample(self, iteration: int) -> list[list[Rollout]]:
        config = self._line.config
        rank, world = distributed.rank(), distributed.world_size()
        prompts = self._line.prompts.take(iteration, config.rollout.prompts, rank, world)
        sampling = Sampling(
            temperature=config.rollout.temperature,
            max_tokens=min(TOKENS, config.rollout.max_tokens),
            seed=config.run.seed + 2**32,  # not the noise of training or evaluation
        )
        return self._line.policy.sample(prompts[:PROMPTS], n=1, iteration=iteration, sampling=sampling)
