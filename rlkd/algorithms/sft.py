"""SFT: supervised fine-tuning on completions of the data, on the same line as everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from rlkd.algorithms.base import Algorithm, Counts, Loss
from rlkd.algorithms.opd import from_data
from rlkd.algorithms.sft_options import SFTConfig
from rlkd.config.schema import AlgorithmConfig
from rlkd.generation.sampler import Sampler
from rlkd.losses import reduction_weights, weighted_sum
from rlkd.models.logprob_head import Needs, PolicyOutput
from rlkd.teachers.teacher import Teacher
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

    def rollout(
        self, prompts: Sequence[Prompt], policy: Sampler, teacher: Teacher | None, iteration: int
    ) -> list[list[Rollout]]:
        return [[from_data(prompt)] for prompt in prompts]

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        return [replace(scored, advantage=1.0) for scored in group]

    def weigh(self, batch: Batch, counts: Counts) -> Batch:
        mask, longest = batch.completion_mask, self.longest_completion
        weights = reduction_weights(mask, self.options.reduction, counts.tokens, counts.sequences, longest)
        return replace(batch, weights=weights)

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        assert batch.weights is not None and batch.token_weights is not None and output.entropy is not None
        total = weighted_sum(-output.logprobs * batch.advantages, batch.weights)
        return Loss(
            total=total,
            metrics={
                "nll": weighted_sum(-output.logprobs.detach(), batch.token_weights),
                "entropy": weighted_sum(output.entropy.detach(), batch.token_weights),
            },
        )
