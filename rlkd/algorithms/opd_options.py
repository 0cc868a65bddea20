"""The section `algorithm` of OPD, and of what refines it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.config.kinds import Reduction
from rlkd.config.schema import AlgorithmConfig, Config


class OPDConfig(AlgorithmConfig):
    """On-policy distillation (GKD, arXiv 2306.13649): the teacher grades every token of the student's own samples."""

    name: Literal["opd"] = Field(description="opd")
    group_size: int = Field(4, ge=1, description="completions per prompt")
    divergence: DivergenceConfig = Field(DivergenceConfig(), description="what is minimised at each token")
    student_share: float = Field(
        1.0, ge=0, le=1, description="GKD's λ: share of prompts that the student completes; others write the rest"
    )
    others: Literal["data", "teacher"] = Field(
        "data", description="who completes the rest: data.completion_column, or the teacher, sampling"
    )
    reduction: Reduction = Field("token_mean", description="normaliser: all tokens, or tokens of a sequence first")
    importance_cap: float = Field(2.0, gt=0, description="sampled tier: cap of the weight between sampler and trainer")
    ratio_cap: float | None = Field(
        None,
        gt=0,
        description="full, top_k: each token that the student sampled counts min(π/π_old, cap) · min(π_old/π_sampler, "
        "cap) times, as in SDPO's code; null: no weighting, even with several updates per iteration.",
    )
    mask_eos: bool = Field(False, description="no imitation on the end-of-sequence token, where chat templates differ")

    @property
    def teacher_writes(self) -> bool:
        return self.student_share < 1 and self.others == "teacher"

    def trained_lengths(self, config: Config) -> dict[str, int]:
        if self.student_share == 1 or self.others == "teacher":
            return super().trained_lengths(config)
        completion = max(config.data.max_completion_tokens, config.rollout.max_tokens)
        return {"data.max_prompt_tokens": config.data.max_prompt_tokens, "data.max_completion_tokens": completion}

    def teacher_lengths(self, config: Config) -> dict[str, int]:
        return self.trained_lengths(config)

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config) + self.divergence.problems(config)
        if self.student_share < 1 and self.divergence.tier == "sampled":
            why = "is sampled, which is exact on the student's own tokens only; set algorithm.student_share: 1"
            found.append(("algorithm.divergence.tier", why))
        if self.student_share < 1 and self.divergence.sampler_top_k:
            why = "is sampler, but others' completions have no sampler (algorithm.student_share < 1); set teacher"
            found.append(("algorithm.divergence.support", why))
        if self.student_share < 1 and self.group_size > 1:
            why = f"is {self.group_size}, but others complete a prompt once (algorithm.student_share < 1); set it to 1"
            found.append(("algorithm.group_size", why))
        if self.student_share < 1 and self.others == "data" and config.data.completion_column is None:
            why = f"is {self.student_share}, but data.completion_column is null; name the column of the completions"
            found.append(("algorithm.student_share", why))
        return found
