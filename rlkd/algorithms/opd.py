"""OPD: on-policy distillation, and GKD, its mixture with completions from the data or the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from rlkd.algorithms.advantages import distilled
from rlkd.algorithms.base import Algorithm, Loss, Term
from rlkd.algorithms.opd_options import OPDConfig
from rlkd.config.schema import AlgorithmConfig
from rlkd.data import seeds
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import AsyncSampler, Sampling
from rlkd.losses import (
    importance_weights,
    kl_k1_advantage,
    kl_k2,
    kl_k3,
    weighted_sum,
)
from rlkd.models.logprob_head import Needs, PolicyOutput
from rlkd.teachers.teacher import AsyncTeacher, ScoreRequest
from rlkd.types import Batch, Prompt, Rollout, ScoredRollout, Signal, written


class OPD(Algorithm):
    """L(θ) = E_x E_{y ~ π_θ(·|x)} [ Σ_t D( π_T(·|x, y_<t), π_θ(·|x, y_<t) ) / N ]

    GKD, arXiv 2306.13649, Eq. 4 at λ = 1: no gradient flows through the sampling. D is a KL or the generalised JSD(β)
    over the whole vocabulary, over the top k tokens and the rest, or on the sampled token only: there
    −(log π_T − log π_θ) · ∇log π_θ expects its gradient (Thinking Machines, "On-policy distillation", 2025). With
    `student_share` = λ < 1 the other prompts are completed by the data or the teacher. Rewards, where available,
    are only logged.
    """

    Options: ClassVar[type[AlgorithmConfig]] = OPDConfig
    uses_teacher = True
    masks_failed = False

    @property
    def options(self) -> OPDConfig:
        assert isinstance(self.config.algorithm, OPDConfig)
        return self.config.algorithm

    @property
    def needs_rewards(self) -> bool:
        return False

    @property
    def signal(self) -> Signal:
        return self.options.divergence.signal

    @property
    def sampling(self) -> Sampling:
        return replace(super().sampling, top_k=self.options.divergence.sampler_top_k)

    @property
    def blend(self) -> float | None:
        """See `DivergenceSpec.blend`."""
        return None

    @property
    def needs(self) -> Needs:
        options, temperature = self.options, self.teacher_temperature
        comparison = options.divergence.comparison(temperature, blend=self.blend, ratio_cap=options.ratio_cap)
        return Needs(
            temperature=self.config.rollout.temperature,
            entropy=True,
            comparison=comparison,
            policy_gradient=comparison is None,
        )

    async def rollout(
        self, prompt: Prompt, policy: AsyncSampler, teacher: AsyncTeacher | None, iteration: int
    ) -> list[Rollout]:
        if self._is_students(prompt, iteration):
            return await super().rollout(prompt, policy, teacher, iteration)
        return [await self._by_others(prompt, teacher, iteration)]

    def _is_students(self, prompt: Prompt, iteration: int) -> bool:
        """True with probability λ, drawn by (seed, iteration, prompt)."""
        draw = seeds.generator(self.config.run.seed, iteration, "student_share", prompt.id).random()
        return bool(draw < self.options.student_share)

    async def _by_others(self, prompt: Prompt, teacher: AsyncTeacher | None, iteration: int) -> Rollout:
        if self.options.others == "data":
            return from_data(prompt)
        assert teacher is not None
        question = ScoreRequest(prompt.token_ids, name=prompt.id, meta=prompt.meta)
        (completion,) = await teacher.write([question], self.sampling, iteration)
        return written(prompt, completion.token_ids, "teacher", completion.finish_reason)

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        spared = self.options.mask_eos
        return [s.with_mask("kd", distilled(s.rollout, s.teacher is not None, spared)) for s in group]

    @property
    def terms(self) -> Mapping[str, Term]:
        return {
            **super().terms,
            "kd": Term(mask="kd", reduction=self.options.reduction),
            # Where a KL is estimated, all completions are the student's; those without a context have no score.
            "student": Term(mask=("student", "kd"), mean_over="kd"),
        }

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        assert output.entropy is not None
        weights = batch.loss_weights
        metrics = {"entropy": weighted_sum(output.entropy.detach(), weights["token"])}
        if output.divergence is None:
            total = weighted_sum(self._on_sampled_tokens(output, batch), weights["kd"])
        else:
            assert output.token_divergence is not None
            scale = self.options.divergence.scale
            total = scale * output.divergence
            metrics["kd/divergence"] = scale * weighted_sum(output.token_divergence, weights["kd"])
        of_samples = self.options.student_share == 1 and self.teacher_temperature == self.config.rollout.temperature
        if of_samples:  # otherwise it does not estimate a KL
            value = kl_k3(output.logprobs.detach(), self._teacher_logprobs(output, batch))
            metrics["kd/kl"] = weighted_sum(value * self._ratio(output, batch).detach(), weights["student"])
        return Loss(total=total, metrics=metrics | {"loss/kd": total.detach()})

    def _teacher_logprobs(self, output: PolicyOutput, batch: Batch) -> Tensor:
        """[B, T]; the student's own log-probs where there is no score, so that nothing overflows."""
        return torch.where(batch.masks["kd"], batch.scores["teacher"].logprobs, output.logprobs.detach())

    def _on_sampled_tokens(self, output: PolicyOutput, batch: Batch) -> Tensor:
        """[B, T] with the expected gradient of KL(π‖T), corrected for tokens that older or other weights sampled."""
        teacher, ratio = self._teacher_logprobs(output, batch), self._ratio(output, batch)
        if self.options.divergence.form == "k2":
            return kl_k2(output.logprobs, teacher) * ratio.detach()
        return -kl_k1_advantage(output.logprobs, teacher) * ratio

    def _ratio(self, output: PolicyOutput, batch: Batch) -> Tensor:
        """[B, T] π/π_old · min(π_old/π_sampler, cap): reweights a sampled token as if the current policy drew it."""
        assert batch.old_logprobs is not None
        cap = self.options.importance_cap
        importance = importance_weights(batch.old_logprobs, batch.sampler_logprobs, batch.student_mask, "truncate", cap)
        return torch.exp(output.logprobs - batch.old_logprobs) * importance


def from_data(prompt: Prompt) -> Rollout:
    """The prompt's completion from the data. Raises: RunStopped if there is none."""
    if prompt.completion is None:
        raise RunStopped(f"prompt {prompt.id!r}: expected a completion, got none; set data.completion_column")
    return written(prompt, prompt.completion, "data", "stop")
