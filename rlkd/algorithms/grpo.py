"""GRPO: group-relative policy optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlkd.advantages import group_relative
from rlkd.config import AlgorithmConfig
from rlkd.losses import (
    clipped_surrogate,
    clipped_tokens,
    importance_weights,
    kl_k2,
    kl_k3,
    reduction_weights,
    weighted_sum,
)
from rlkd.module import Counts, Loss, PolicyModule
from rlkd.policy_head import Needs, PolicyOutput
from rlkd.types import Batch, ScoredRollout


class GRPOConfig(AlgorithmConfig):
    """Group-relative policy optimisation (arXiv 2402.03300)."""

    name: Literal["grpo"] = Field(description="grpo")
    group_size: int = Field(8, ge=2, description="completions per prompt, the group that rewards are compared in")
    normalise: bool = Field(True, description="divide advantages by the group's standard deviation; false: mean only")
    clip_low: float = Field(0.2, ge=0, description="ε_low: the ratio is clipped below 1 − ε_low")
    clip_high: float = Field(0.2, ge=0, description="ε_high: the ratio is clipped above 1 + ε_high")
    reduction: Literal["token_mean", "sequence_mean", "dr_grpo"] = Field(
        "token_mean",
        description="normaliser: all tokens, tokens of a sequence then sequences, or sequences × max_tokens",
    )
    importance: Literal["truncate", "mask", "off"] = Field(
        "truncate", description="correction for sampler ≠ trainer: cap the weight, drop tokens above the cap, or none"
    )
    importance_cap: float = Field(2.0, gt=0, description="cap of the importance weight")
    reference_coef: float = Field(0.0, ge=0, description="coefficient of a KL to the student's start; 0: none")
    reference_estimator: Literal["k2", "k3"] = Field(
        "k3", description="k2 has the gradient of KL(π‖reference), k3 that of KL(reference‖π)"
    )


class GRPO(PolicyModule):
    """J(θ) = E[ Σ_i Σ_t min(ρ_it A_i, clip(ρ_it, 1−ε_low, 1+ε_high) A_i) / N ] − c · KL(π_θ, π_ref)

    with A_i = (r_i − mean(r)) / std(r) over the G completions of one prompt. arXiv 2402.03300, Eq. 3; 1/N is the
    token mean of DAPO (arXiv 2503.14476) unless `reduction` says otherwise. Each token's term is multiplied by the
    importance weight between what sampled it and the trainer.
    """

    Options: ClassVar[type[AlgorithmConfig]] = GRPOConfig

    @property
    def algorithm(self) -> GRPOConfig:
        assert isinstance(self.config.algorithm, GRPOConfig)
        return self.config.algorithm

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        values = group_relative([scored.reward for scored in group], self.algorithm.normalise)
        return [replace(scored, advantage=value) for scored, value in zip(group, values, strict=True)]

    @property
    def needs(self) -> Needs:
        return Needs(temperature=self.config.rollout.temperature, entropy=True)

    @property
    def needs_reference(self) -> bool:
        return self.algorithm.reference_coef > 0

    def weigh(self, batch: Batch, counts: Counts) -> Batch:
        weights = reduction_weights(
            batch.completion_mask,
            self.algorithm.reduction,
            counts.tokens,
            counts.sequences,
            self.config.rollout.max_tokens,
        )
        return replace(batch, weights=weights)

    def importance(self, batch: Batch) -> Tensor | float:
        """[B, T] weight between sampler and trainer, or 1."""
        if self.algorithm.importance == "off":
            return 1.0
        assert batch.old_logprobs is not None
        return importance_weights(
            batch.old_logprobs,
            batch.sampler_logprobs,
            batch.student_mask,
            self.algorithm.importance,
            self.algorithm.importance_cap,
        )

    def policy_loss(self, output: PolicyOutput, batch: Batch, advantages: Tensor) -> Loss:
        """The clipped surrogate of `advantages` [B, T], and the KL to the reference where there is one."""
        options = self.algorithm
        assert batch.old_logprobs is not None and batch.weights is not None and batch.token_weights is not None
        clip = (options.clip_low, options.clip_high)
        surrogate = clipped_surrogate(output.logprobs, batch.old_logprobs, advantages, *clip)
        total = weighted_sum(surrogate * self.importance(batch), batch.weights)
        clipped = clipped_tokens(output.logprobs, batch.old_logprobs, advantages, *clip)
        metrics = {
            "loss/pg": total.detach(),
            "clip_fraction": weighted_sum(clipped.float(), batch.token_weights),
        }
        if output.entropy is not None:
            metrics["entropy"] = weighted_sum(output.entropy.detach(), batch.token_weights)
        if options.reference_coef > 0:
            assert batch.reference_logprobs is not None
            estimator = {"k2": kl_k2, "k3": kl_k3}[options.reference_estimator]
            # Prompts and padding have no score: there the student is its own reference, so that nothing overflows.
            reference = torch.where(batch.completion_mask, batch.reference_logprobs, output.logprobs.detach())
            to_reference = estimator(output.logprobs, reference)
            total = total + options.reference_coef * weighted_sum(to_reference, batch.weights)
            value = kl_k3(output.logprobs.detach(), reference)
            metrics["reference/kl"] = weighted_sum(value, batch.token_weights)
        return Loss(total=total, metrics=metrics)

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        return self.policy_loss(output, batch, batch.advantages)
