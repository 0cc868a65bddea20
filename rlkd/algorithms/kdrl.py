"""KDRL: knowledge distillation and reinforcement learning in one objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from rlkd.algorithms.advantages import distilled
from rlkd.algorithms.base import Counts, Loss
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.kdrl_options import KDRLConfig
from rlkd.config.schema import AlgorithmConfig
from rlkd.losses import kl_k1_advantage, kl_k2, kl_k3, reduction_weights, weighted_sum
from rlkd.models.logprob_head import PolicyOutput
from rlkd.types import Batch, ScoredRollout

__all__ = ["KDRL", "KDRLConfig"]


class KDRL(GRPO):
    """J_KDRL(θ) = J_GRPO(θ) − β(t) · D_KL^{k2}(π_θ ‖ π_T), on the student's own samples.

    arXiv 2506.02208, Eq. 8: minimises L_GRPO + β · mean_t ½ (log π_T − log π_θ)². β is annealed from 5e-3 to 1e-3 over
    80 steps (§3.3). `kd.mask` is the reward-guided masking of §3.4; it looks at the reward as it was given, so that
    neither the overlong penalty nor `mask_truncated` touches distillation. Groups without variance in their rewards
    keep their distillation gradient, and dynamic sampling keeps such groups. With `form: joint`, off-policy tokens
    (several updates, another sampler) are corrected by the ratio; with `form: advantage` the teacher's share is part of
    the surrogate, whose clip silences it too.
    """

    Options: ClassVar[type[AlgorithmConfig]] = KDRLConfig
    uses_teacher = True

    @property
    def options(self) -> KDRLConfig:
        assert isinstance(self.config.algorithm, KDRLConfig)
        return self.config.algorithm

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        marks = self._distilled(group)
        return [replace(s, distil=mark) for s, mark in zip(super().advantages(group), marks, strict=True)]

    def has_gradient(self, group: Sequence[ScoredRollout], iteration: int) -> bool:
        """By its rewards, or by the teacher: a group whose rewards are all equal is what distillation is for."""
        if self.options.policy_coef(iteration) > 0 and super().has_gradient(group, iteration):
            return True
        kept = (any(mark) and s.error is None for s, mark in zip(group, self._distilled(group), strict=True))
        return self.options.kd.coef(iteration) > 0 and any(kept)

    def _distilled(self, group: Sequence[ScoredRollout]) -> list[tuple[bool, ...]]:
        """Per completion and token, whether the teacher is imitated there: decided by the reward as it was given."""
        correct = [scored.is_correct(self.config.reward.correct_at) for scored in group]
        kept = {
            "none": [True] * len(group),
            "response": [c is False for c in correct],
            "group": [True not in correct] * len(group),
        }[self.options.kd.mask]
        return [distilled(s.rollout, keep, self.options.kd.mask_eos) for s, keep in zip(group, kept, strict=True)]

    def weigh(self, batch: Batch, counts: Counts) -> Batch:
        batch = super().weigh(batch, counts)
        assert batch.distil_mask is not None
        kept = self.options.kd.denominator == "kept"
        normaliser = batch.distil_mask if kept else batch.completion_mask
        over_all = reduction_weights(
            normaliser,
            self.options.reduction,
            counts.distil_tokens if kept else counts.tokens,
            counts.distil_sequences if kept else counts.sequences,
            self.longest_completion,
        )
        return replace(batch, distil_weights=torch.where(batch.distil_mask, over_all, 0.0))

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        kd = self.options.kd
        beta, policy_coef = kd.coef(iteration), self.options.policy_coef(iteration)
        assert batch.teacher_logprobs is not None
        assert batch.weights is not None and batch.distil_weights is not None and batch.token_weights is not None
        # Prompts and padding have no score: there the student is its own teacher, so that nothing overflows.
        teacher = torch.where(batch.completion_mask, batch.teacher_logprobs, output.logprobs.detach())
        log_ratio = kl_k1_advantage(output.logprobs, teacher)  # R_t = log T − log π
        advantages = policy_coef * batch.advantages
        share = torch.where(batch.weights > 0, batch.distil_weights / batch.weights, 0.0)
        if kd.form == "advantage":
            policy = self.policy_loss(output, batch, advantages + beta * share * log_ratio)
            total, kd_loss = policy.total, weighted_sum(-log_ratio, batch.distil_weights)
        else:
            policy = self.policy_loss(output, batch, advantages)
            estimator = {"k2": kl_k2, "k3": kl_k3}[kd.estimator]
            per_token = estimator(output.logprobs, teacher)
            kd_loss = weighted_sum(per_token * self.current_policy(output, batch), batch.distil_weights)
            total = policy.total + beta * kd_loss
        # The teacher's advantage beside A: minus the slope of its estimator in log π.
        pull = torch.expm1(log_ratio) if kd.estimator == "k3" else log_ratio
        flipped = (advantages + beta * share * pull) * advantages < 0
        metrics = policy.metrics | {
            "loss/kd": kd_loss.detach(),
            "kd/coef": torch.tensor(beta) * batch.token_weights.sum(),
            "kd/kl": self.measured_kl(output, teacher, batch),
            "kd/flipped": weighted_sum(flipped.float(), batch.token_weights),
        }
        return Loss(total=total, metrics=metrics)
