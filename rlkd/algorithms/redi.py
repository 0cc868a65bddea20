"""REDI: learning from right and wrong traces, without a reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from rlkd.algorithms.opd import from_data
from rlkd.algorithms.sft import SFT, SFTConfig
from rlkd.config.schema import AlgorithmConfig, Config
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampler
from rlkd.losses import weighted_sum
from rlkd.models.logprob_head import PolicyOutput
from rlkd.teachers.teacher import Teacher
from rlkd.training.module import Counts, Loss
from rlkd.types import Batch, Prompt, Rollout, ScoredRollout, written


class REDIConfig(SFTConfig):
    """REDI (arXiv 2505.24850): pairs of `data.completion_column` and `data.rejected_column`."""

    name: Literal["redi"] = Field(description="redi")  # type: ignore[assignment]
    group_size: Literal[2] = Field(2, description="two completions per prompt: the chosen and the rejected one")  # type: ignore[assignment]
    reduction: Literal["sequence_mean"] = Field("sequence_mean", description="Eq. 5: tokens of a trace, then pairs")
    alpha: float = Field(0.8, ge=0, le=1, description="α, weight of the rejected trace; 0: SFT, 1: symmetric")

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        if config.data.rejected_column is None:
            found.append(("data.rejected_column", "is null, but algorithm.name redi trains on pairs; name the column"))
        return found


class REDI(SFT):
    """L(θ) = E_{(x, y_w, y_l)} [ −log π_θ(y_w|x) / |y_w| + α · log π_θ(y_l|x) / |y_l| ]

    arXiv 2505.24850, Eq. 5. It is unbounded below: a collapse shows as `chosen/logprob` falling together with
    `rejected/logprob`. An α below 1 and a small learning rate (1e-6) are what keep it from there.
    """

    Options: ClassVar[type[AlgorithmConfig]] = REDIConfig

    @property
    def algorithm(self) -> REDIConfig:
        assert isinstance(self.config.algorithm, REDIConfig)
        return self.config.algorithm

    def rollout(
        self, prompts: Sequence[Prompt], policy: Sampler, teacher: Teacher | None, iteration: int
    ) -> list[list[Rollout]]:
        return [[from_data(prompt), _rejected(prompt)] for prompt in prompts]

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        chosen, rejected = group
        return [replace(chosen, advantage=1.0), replace(rejected, advantage=-self.algorithm.alpha)]

    def weigh(self, batch: Batch, counts: Counts) -> Batch:
        """mask / (len_i · N_pairs): a pair is two sequences."""
        return super().weigh(batch, replace(counts, sequences=counts.sequences / 2))

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        loss = super().loss(output, batch, iteration)
        assert batch.weights is not None
        logprobs, chosen = output.logprobs.detach(), (batch.advantages > 0).float()
        sides = {
            "chosen/logprob": weighted_sum(logprobs, batch.weights * chosen),
            "rejected/logprob": weighted_sum(logprobs, batch.weights * (1.0 - chosen)),
        }
        return replace(loss, metrics=loss.metrics | sides)


def _rejected(prompt: Prompt) -> Rollout:
    if prompt.rejected is None:
        raise RunStopped(f"prompt {prompt.id!r}: expected a rejected completion, got none; set data.rejected_column")
    return written(prompt, prompt.rejected, "data", "stop")
