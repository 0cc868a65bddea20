"""KDRL: knowledge distillation and reinforcement learning in one objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlkd.algorithms.grpo import GRPO, GRPOConfig
from rlkd.config import AlgorithmConfig, Config, NoTeacher, Section
from rlkd.losses import kl_k1_advantage, kl_k2, kl_k3, reduction_weights, weighted_sum
from rlkd.module import Counts, Loss
from rlkd.policy_head import PolicyOutput
from rlkd.schedules import Constant, Linear, Schedule
from rlkd.types import Batch, ScoredRollout


class DistillationConfig(Section):
    """The teacher's share of KDRL."""

    form: Literal["joint", "advantage"] = Field(
        "joint", description="joint: a loss beside the surrogate; advantage: β·log(T/π) added to each token's advantage"
    )
    estimator: Literal["k2", "k3"] = Field(
        "k2", description="joint form: k2 has the gradient of KL(π‖T), k3 that of KL(T‖π); k1 has none and is refused"
    )
    coef: Schedule = Field(
        Linear(kind="linear", start=5e-3, end=1e-3, over=80), description="β, a number or a schedule over iterations"
    )
    mask: Literal["none", "response", "group"] = Field(
        "none", description="imitate on all completions, on failed ones, or only in groups where all failed"
    )
    denominator: Literal["all", "kept"] = Field(
        "all", description="normalise by all completion tokens (β keeps its meaning) or by those that the mask kept"
    )
    mask_eos: bool = Field(False, description="no imitation on the end-of-sequence token, where chat templates differ")

    @field_validator("estimator", mode="before")
    @classmethod
    def _no_k1(cls, value: Any) -> Any:
        if value == "k1":
            raise ValueError(
                "k1 = log π − log T has zero expected gradient when back-propagated (it only adds noise); "
                "use k2, or form: advantage, which uses it detached"
            )
        return value


class KDRLConfig(GRPOConfig):
    """KDRL (arXiv 2506.02208): GRPO and on-policy distillation in one objective."""

    name: Literal["kdrl"] = Field(description="kdrl")  # type: ignore[assignment]
    policy_coef: Schedule = Field(
        Constant(value=1.0), description="factor of the reward's advantages; 0: distillation only"
    )
    kd: DistillationConfig = Field(DistillationConfig(), description="the teacher's share")

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        teacher, temperature = config.teacher, config.rollout.temperature
        if isinstance(teacher, NoTeacher):
            why = "is none, but algorithm.name kdrl imitates a teacher; set local or served"
            found.append(("teacher.backend", why))
        elif teacher.temperature != temperature:
            why = (
                f"is {teacher.temperature}, but rollout.temperature is {temperature}; k2, k3 and log T − log π have "
                "the gradient of a KL only on samples of the distribution that they compare: make them equal"
            )
            found.append(("teacher.temperature", why))
        if self.kd.form == "advantage" and self.kd.estimator != "k2":
            why = f"is {self.kd.estimator}, but algorithm.kd.form: advantage uses log T − log π; drop the estimator"
            found.append(("algorithm.kd.estimator", why))
        return found


class KDRL(GRPO):
    """J_KDRL(θ) = J_GRPO(θ) − β(t) · D_KL^{k2}(π_θ ‖ π_T), on the student's own samples.

    arXiv 2506.02208, Eq. 8: minimises L_GRPO + β · mean_t ½ (log π_T − log π_θ)². β is annealed from 5e-3 to 1e-3 over
    80 steps (§3.3). `kd.mask` is the reward-guided masking of §3.4. Groups without variance in their rewards keep
    their distillation gradient. Off-policy tokens (several updates, another sampler) are corrected by the ratio.
    """

    Options: ClassVar[type[AlgorithmConfig]] = KDRLConfig
    uses_teacher = True

    @property
    def algorithm(self) -> KDRLConfig:
        assert isinstance(self.config.algorithm, KDRLConfig)
        return self.config.algorithm

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        correct = [scored.is_correct(self.config.reward.correct_at) for scored in group]
        kept = {
            "none": [True] * len(group),
            "response": [c is False for c in correct],
            "group": [True not in correct] * len(group),
        }[self.algorithm.kd.mask]
        return [
            replace(scored, distil=self._distilled_tokens(scored, keep))
            for scored, keep in zip(super().advantages(group), kept, strict=True)
        ]

    def _distilled_tokens(self, scored: ScoredRollout, keep: bool) -> tuple[bool, ...]:
        tokens = [keep] * len(scored.rollout.token_ids)
        if self.algorithm.kd.mask_eos and scored.rollout.finish_reason == "stop":
            tokens[-1] = False
        return tuple(tokens)

    def weigh(self, batch: Batch, counts: Counts) -> Batch:
        batch = super().weigh(batch, counts)
        assert batch.distil_mask is not None
        kept = self.algorithm.kd.denominator == "kept"
        normaliser = batch.distil_mask if kept else batch.completion_mask
        over_all = reduction_weights(
            normaliser,
            self.algorithm.reduction,
            counts.distil_tokens if kept else counts.tokens,
            counts.distil_sequences if kept else counts.sequences,
            self.config.rollout.max_tokens,
        )
        return replace(batch, distil_weights=torch.where(batch.distil_mask, over_all, 0.0))

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        kd = self.algorithm.kd
        beta, policy_coef = kd.coef(iteration), self.algorithm.policy_coef(iteration)
        assert batch.teacher_logprobs is not None
        assert batch.weights is not None and batch.distil_weights is not None and batch.token_weights is not None
        # Prompts and padding have no score: there the student is its own teacher, so that nothing overflows.
        teacher = torch.where(batch.completion_mask, batch.teacher_logprobs, output.logprobs.detach())
        log_ratio = kl_k1_advantage(output.logprobs, teacher)  # R_t = log T − log π
        advantages = policy_coef * batch.advantages
        if kd.form == "advantage":
            share = torch.where(batch.weights > 0, batch.distil_weights / batch.weights, 0.0)
            policy = self.policy_loss(output, batch, advantages + beta * share * log_ratio)
            total, kd_loss = policy.total, weighted_sum(-log_ratio, batch.distil_weights)
        else:
            policy = self.policy_loss(output, batch, advantages)
            estimator = {"k2": kl_k2, "k3": kl_k3}[kd.estimator]
            per_token = estimator(output.logprobs, teacher)
            kd_loss = weighted_sum(per_token * self._correction(output, batch), batch.distil_weights)
            total = policy.total + beta * kd_loss
        value = kl_k3(output.logprobs.detach(), teacher)
        conflict = (batch.advantages * log_ratio < 0) & (batch.distil_weights > 0)
        metrics = policy.metrics | {
            "loss/kd": kd_loss.detach(),
            "kd/coef": torch.tensor(beta) * batch.token_weights.sum(),
            "kd/kl": weighted_sum(value, batch.token_weights),
            "kd/sign_conflict": weighted_sum(conflict.float(), batch.token_weights),
        }
        return Loss(total=total, metrics=metrics)

    def _correction(self, output: PolicyOutput, batch: Batch) -> Tensor:
        """[B, T] detached π/π_old · π_old/π_sampler: k2 and k3 are exact only under the current policy."""
        assert batch.old_logprobs is not None
        return torch.exp(output.logprobs.detach() - batch.old_logprobs) * self.importance(batch)
