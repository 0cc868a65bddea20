"""KDRL: knowledge distillation and reinforcement learning in one objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from rlkd.algorithms.advantages import distilled
from rlkd.algorithms.base import Loss, Term
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.kdrl_options import KDRLConfig
from rlkd.config.schema import AlgorithmConfig
from rlkd.losses import kl_k1_advantage, kl_k2, kl_k3, weighted_sum
from rlkd.models.logprob_head import PolicyOutput
from rlkd.types import Batch, ScoredRollout

__all__ = ["KDRL", "KDRLConfig"]


class KDRL(GRPO):
    """J_KDRL(θ) = J_GRPO(θ) − β(t) · D_KL^{k2}(π_θ ‖ π_T), on the student's own samples.

    arXiv 2506.02208, Eq. 8: minimises L_GRPO + β · mean_t ½ (log π_T − log π_θ)². β is annealed from 5e-3 to 1e-3 over
    80 steps (§3.3). `kd.mask` is the reward-guided masking of §3.4; it uses the original reward, so that
    neither the overlong penalty nor `mask_truncated` touches distillation. Groups without variance in their rewards
    keep their distillation gradient, and dynamic sampling keeps such groups. With `form: joint`, off-policy tokens
    (several updates, another sampler) are corrected by the ratio; with `form: advantage` the teacher's share is part of
    the surrogate, so the clip can remove it too.
    """

    Options: ClassVar[type[AlgorithmConfig]] = KDRLConfig
    uses_teacher = True

    @property
    def options(self) -> KDRLConfig:
        assert isinstance(self.config.algorithm, KDRLConfig)
        return self.config.algorithm

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        masks = self._distilled(group)
        return [s.with_mask("kd", mask) for s, mask in zip(super().advantages(group), masks, strict=True)]

    def has_gradient(self, group: Sequence[ScoredRollout], iteration: int) -> bool:
        """From rewards or from the teacher: distillation also trains on groups whose rewards are all equal."""
        if self.options.policy_coef(iteration) > 0 and super().has_gradient(group, iteration):
            return True
        kept = (any(mark) and s.error is None for s, mark in zip(group, self._distilled(group), strict=True))
        return self.options.kd.coef(iteration) > 0 and any(kept)

    def _distilled(self, group: Sequence[ScoredRollout]) -> list[tuple[bool, ...]]:
        """Per completion and token, whether the teacher is imitated there. Uses the original reward."""
        correct = [scored.is_correct(self.config.reward.correct_at) for scored in group]
        kept = {
            "none": [True] * len(group),
            "response": [c is False for c in correct],
            "group": [True not in correct] * len(group),
        }[self.options.kd.mask]
        return [distilled(s.rollout, keep, self.options.kd.mask_eos) for s, keep in zip(group, kept, strict=True)]

    @property
    def terms(self) -> Mapping[str, Term]:
        counted = "kd" if self.options.kd.denominator == "kept" else "completion"
        return {**super().terms, "kd": Term(mask="kd", mean_over=counted, reduction=self.options.reduction)}

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        kd = self.options.kd
        beta, policy_coef = kd.coef(iteration), self.options.policy_coef(iteration)
        weights = batch.loss_weights
        # Prompts and padding have no score: the student's own log-probs are used there, so that nothing overflows.
        teacher = torch.where(batch.completion_mask, batch.scores["teacher"].logprobs, output.logprobs.detach())
        log_ratio = kl_k1_advantage(output.logprobs, teacher)  # R_t = log T − log π
        advantages = policy_coef * batch.advantages
        share = torch.where(weights["policy"] > 0, weights["kd"] / weights["policy"], 0.0)
        if kd.form == "advantage":
            policy = self.policy_loss(output, batch, advantages + beta * share * log_ratio)
            total, kd_loss = policy.total, weighted_sum(-log_ratio, weights["kd"])
        else:
            policy = self.policy_loss(output, batch, advantages)
            estimator = {"k2": kl_k2, "k3": kl_k3}[kd.estimator]
            per_token = estimator(output.logprobs, teacher)
            kd_loss = weighted_sum(per_token * self.current_policy(output, batch), weights["kd"])
            total = policy.total + beta * kd_loss
        # The teacher's advantage, which is added to A: minus the derivative of its estimator by log π.
        pull = torch.expm1(log_ratio) if kd.estimator == "k3" else log_ratio
        flipped = (advantages + beta * share * pull) * advantages < 0
        metrics = policy.metrics | {
            "loss/kd": kd_loss.detach(),
            "kd/coef": torch.tensor(beta) * weights["token"].sum(),
            "kd/kl": self.measured_kl(output, teacher, batch),
            "kd/flipped": weighted_sum(flipped.float(), weights["token"]),
        }
        return Loss(total=total, metrics=metrics)
