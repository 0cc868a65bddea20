"""REDI: learning from right and wrong traces, without a reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from rlkd.algorithms.base import Loss, Term
from rlkd.algorithms.opd import from_data
from rlkd.algorithms.redi_options import REDIConfig
from rlkd.algorithms.sft import SFT
from rlkd.config.schema import AlgorithmConfig
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import AsyncSampler
from rlkd.losses import weighted_sum
from rlkd.models.logprob_head import PolicyOutput
from rlkd.teachers.teacher import AsyncTeacher
from rlkd.types import Batch, Prompt, Rollout, ScoredRollout, written


class REDI(SFT):
    """L(θ) = E_{(x, y_w, y_l)} [ −log π_θ(y_w|x) / |y_w| + α · log π_θ(y_l|x) / |y_l| ]

    arXiv 2505.24850, Eq. 5. It is unbounded below: a collapse shows as `chosen/logprob` falling together with
    `rejected/logprob`. An α below 1 and a small learning rate (1e-6) prevent it.
    """

    Options: ClassVar[type[AlgorithmConfig]] = REDIConfig

    @property
    def options(self) -> REDIConfig:
        assert isinstance(self.config.algorithm, REDIConfig)
        return self.config.algorithm

    async def rollout(
        self, prompt: Prompt, policy: AsyncSampler, teacher: AsyncTeacher | None, iteration: int
    ) -> list[Rollout]:
        return [from_data(prompt), _rejected(prompt)]

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        chosen, rejected = group
        return [replace(chosen, advantage=1.0), replace(rejected, advantage=-self.options.alpha)]

    @property
    def terms(self) -> Mapping[str, Term]:
        """mask / (len_i · N_pairs): a pair is two sequences."""
        terms = super().terms
        return {**terms, "policy": replace(terms["policy"], sequences_per_unit=2)}

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        loss = super().loss(output, batch, iteration)
        weights = batch.loss_weights["policy"]
        logprobs, chosen = output.logprobs.detach(), (batch.advantages > 0).float()
        sides = {
            "chosen/logprob": weighted_sum(logprobs, weights * chosen),
            "rejected/logprob": weighted_sum(logprobs, weights * (1.0 - chosen)),
        }
        return replace(loss, metrics=loss.metrics | sides)


def _rejected(prompt: Prompt) -> Rollout:
    if prompt.rejected is None:
        raise RunStopped(f"prompt {prompt.id!r}: expected a rejected completion, got none; set data.rejected_column")
    return written(prompt, prompt.rejected, "data", "stop")
