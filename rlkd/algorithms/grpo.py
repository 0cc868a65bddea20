"""GRPO: group-relative policy optimisation, and its variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from rlkd.algorithms.advantages import group_relative, leave_one_out, overlong_penalty
from rlkd.algorithms.base import Algorithm, Loss, Term
from rlkd.algorithms.grpo_options import GRPOConfig
from rlkd.config.schema import AlgorithmConfig
from rlkd.losses import (
    capped_tokens,
    cispo_surrogate,
    clipped_surrogate,
    clipped_tokens,
    importance_weights,
    kl_k2,
    kl_k3,
    sequence_old_logprobs,
    weighted_sum,
)
from rlkd.models.logprob_head import Needs, PolicyOutput
from rlkd.types import Batch, Rollout, ScoredRollout

__all__ = ["GRPO", "GRPOConfig"]


class GRPO(Algorithm):
    """J(θ) = E[ Σ_i Σ_t min(ρ_it A_i, clip(ρ_it, 1−ε_low, 1+ε_high) A_i) / N ] − c · KL(π_θ, π_ref) + h · H(π_θ)

    with A_i = (r_i − mean(r)) / std(r) over the G completions of one prompt. arXiv 2402.03300, Eq. 3; 1/N is the
    token mean of DAPO (arXiv 2503.14476) unless `reduction` is another mean. Each token's surrogate is multiplied by
    the importance weight between what sampled it and the trainer; the KL and the entropy are not.

    The options of `GRPOConfig` change single parts of it: the baseline, the reward that enters the comparison, the
    ratio ρ, and the surrogate. Its docstring lists the settings that reproduce the methods of other papers.
    """

    Options: ClassVar[type[AlgorithmConfig]] = GRPOConfig

    @property
    def options(self) -> GRPOConfig:
        assert isinstance(self.config.algorithm, GRPOConfig)
        return self.config.algorithm

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        return [replace(scored, advantage=value) for scored, value in zip(group, self.credit(group), strict=True)]

    def credit(self, group: Sequence[ScoredRollout]) -> list[float]:
        """The advantage of each completion, from the rewards alone; 0 in a group that dynamic sampling drops."""
        rewards = [self._compared(scored) for scored in group]
        if self.options.resample_rounds > 1 and not self._tells_apart(group):
            return [0.0] * len(group)
        if self.options.baseline == "leave_one_out":
            return leave_one_out(rewards)
        return group_relative(rewards, self.options.normalise)

    def _compared(self, scored: ScoredRollout) -> float | None:
        """The reward that enters the comparison; None: the completion is excluded from it.

        DAPO's two rules for long completions (arXiv 2503.14476, §3.4). The reward of a truncated one is not known,
        so `mask_truncated` also keeps it out of the baseline. Terms that need no reward still act on it:
        distillation, the KL to the reference, the entropy. It stays in the normaliser too, so that their coefficients
        keep their meaning relative to the policy term.
        """
        rollout, options = scored.rollout, self.options
        if scored.reward is None or (options.mask_truncated and rollout.finish_reason == "length"):
            return None
        return scored.reward + overlong_penalty(len(rollout.token_ids), self.limit(rollout), options.overlong_cache)

    def limit(self, rollout: Rollout) -> int:
        """The number of tokens at which `rollout` would have been cut off."""
        return self.config.rollout.max_tokens

    def _tells_apart(self, group: Sequence[ScoredRollout]) -> bool:
        """Whether any two of the compared completions differ in the quantity that `filter` names.

        `correct` is DAPO's condition, arXiv 2503.14476, Eq. 11: 0 < number of right answers < G. The overlong penalty
        is ignored: otherwise a group of wrong answers would be trained on as soon as one is a token too long.
        """
        compared = [scored for scored in group if self._compared(scored) is not None]
        if self.options.filter == "correct":
            return len({scored.is_correct(self.config.reward.correct_at) for scored in compared}) > 1
        return len({scored.reward for scored in compared}) > 1

    def has_gradient(self, group: Sequence[ScoredRollout], iteration: int) -> bool:
        return any(self.credit(group))

    @property
    def needs(self) -> Needs:
        return Needs(temperature=self.config.rollout.temperature, entropy=True)

    @property
    def needs_reference(self) -> bool:
        return self.options.reference_coef > 0

    @property
    def terms(self) -> Mapping[str, Term]:
        return {**super().terms, "policy": Term(reduction=self.options.reduction)}

    def importance(self, batch: Batch) -> Tensor | float:
        """[B, T] weight between sampler and trainer, or 1."""
        options = self.options
        if options.importance == "off":
            return 1.0
        assert batch.old_logprobs is not None
        return importance_weights(
            batch.old_logprobs,
            batch.sampler_logprobs,
            batch.student_mask,
            options.importance,
            options.importance_cap,
            options.importance_level,
        )

    def current_policy(self, output: PolicyOutput, batch: Batch) -> Tensor:
        """[B, T] detached π/π_old · π_old/π_sampler: reweights a sampled token as if the current policy drew it."""
        assert batch.old_logprobs is not None
        return torch.exp(output.logprobs.detach() - batch.old_logprobs) * self.importance(batch)

    def surrogate(self, output: PolicyOutput, batch: Batch, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] to be minimised, and [B, T] bool: where its clip or cap is active."""
        options, current, old = self.options, output.logprobs, batch.old_logprobs
        assert old is not None
        if options.ratio == "sequence":
            old = sequence_old_logprobs(current, old, batch.completion_mask)
        if options.surrogate == "cispo":
            cap = options.ratio_cap
            return cispo_surrogate(current, old, advantages, cap), capped_tokens(current, old, cap)
        clips = (options.clip_low, options.clip_high, options.dual_clip)
        return clipped_surrogate(current, old, advantages, *clips), clipped_tokens(current, old, advantages, *clips)

    def policy_loss(self, output: PolicyOutput, batch: Batch, advantages: Tensor) -> Loss:
        """The surrogate of `advantages` [B, T], the entropy bonus, and the KL to the reference if it is used."""
        options = self.options
        assert output.entropy is not None
        weights = batch.loss_weights
        per_token, bound = self.surrogate(output, batch, advantages)
        total = weighted_sum(per_token * self.importance(batch), weights["policy"])
        metrics = {
            "loss/pg": total.detach(),
            "clip_fraction": weighted_sum(bound.float(), weights["token"]),
            "entropy": weighted_sum(output.entropy.detach(), weights["token"]),
        }
        if options.entropy_coef > 0:
            total = total - options.entropy_coef * weighted_sum(output.entropy, weights["token"])
        if options.reference_coef > 0:
            estimator = {"k2": kl_k2, "k3": kl_k3}[options.reference_estimator]
            # Prompts and padding have no score: the student's own log-probs are used there, so that nothing overflows.
            reference = torch.where(batch.completion_mask, batch.scores["reference"].logprobs, output.logprobs.detach())
            to_reference = estimator(output.logprobs, reference)
            total = total + options.reference_coef * weighted_sum(to_reference, weights["policy"])
            metrics["reference/kl"] = self.measured_kl(output, reference, batch)
        return Loss(total=total, metrics=metrics)

    def measured_kl(self, output: PolicyOutput, others: Tensor, batch: Batch) -> Tensor:
        """KL(π‖·) per token to `others` [B, T] log-probs, estimated on the student's samples; for the log."""
        value = kl_k3(output.logprobs.detach(), others)
        return weighted_sum(value * self.current_policy(output, batch), batch.loss_weights["student"])

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        return self.policy_loss(output, batch, batch.advantages)
