"""SFT: supervised fine-tuning on completions of the data, on the same line as all other algorithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from rlkd.algorithms.base import Algorithm, Loss, Term
from rlkd.algorithms.opd import from_data
from rlkd.algorithms.sft_options import SFTConfig
from rlkd.config.schema import AlgorithmConfig
from rlkd.generation.sampler import AsyncSampler
from rlkd.losses import weighted_sum
from rlkd.models.logprob_head import Needs, PolicyOutput
from rlkd.teachers.teacher import AsyncTeacher
from rlkd.types import Batch, Prompt, Rollout, ScoredRollout


class SFT(Algorithm):
    """L(θ) = −E_{(x, y) ~ data} [ Σ_t log π_θ(y_t | x, y_<t) / N ], at temperature 1."""

    Options: ClassVar[type[AlgorithmConfig]] = SFTConfig
    uses_rewards = False

    @property
    def options(self) -> SFTConfig:
        assert isinstance(self.config.algorithm, SFTConfig)
        return self.config.algorithm

    @property
    def needs(self) -> Needs:
        return Needs(temperature=1.0, entropy=True)

    async def rollout(
        self, prompt: Prompt, policy: AsyncSampler, teacher: AsyncTeacher | None, iteration: int
    ) -> list[Rollout]:
        return [from_data(prompt)]

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        return [replace(scored, advantage=1.0) for scored in group]

    @property
    def terms(self) -> Mapping[str, Term]:
        return {**super().terms, "policy": Term(reduction=self.options.reduction)}

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        assert output.entropy is not None
        weights = batch.loss_weights
        total = weighted_sum(-output.logprobs * batch.advantages, weights["policy"])
        return Loss(
            total=total,
            metrics={
                "nll": weighted_sum(-output.logprobs.detach(), weights["token"]),
                "entropy": weighted_sum(output.entropy.detach(), weights["token"]),
            },
        )
