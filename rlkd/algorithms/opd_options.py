"""The section `algorithm` of OPD, also the base of other algorithms' sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.config.kinds import Reduction
from rlkd.config.schema import AlgorithmConfig, Config


class OPDConfig(AlgorithmConfig):
    """On-policy distillation (GKD, arXiv 2306.13649): the teacher scores every token of the student's own samples."""

    name: Literal["opd"] = Field(description="opd")
    group_size: int = Field(4, ge=1, description="completions per prompt")
    divergence: DivergenceConfig = Field(
        DivergenceConfig(), description="the divergence that is minimised at each token"
    )
    student_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="GKD's λ: fraction of prompts that the student completes; the rest are completed by `others`",
    )
    others: Literal["data", "teacher"] = Field(
        "data", description="source of the other completions: data.completion_column, or samples from the teacher"
    )
    reduction: Reduction = Field(
        "token_mean",
        description="average over all tokens, over tokens per sequence then sequences, or over sequences × longest "
        "completion",
    )
    importance_cap: float = Field(
        2.0, gt=0, description="tier: sampled: cap on the importance weight between sampler and trainer"
    )
    ratio_cap: float | None = Field(
        None,
        gt=0,
        description="full, top_k: weight each token that the student sampled by min(π/π_old, cap) · "
        "min(π_old/π_sampler, "
        "cap), as in SDPO's code; null: no weighting, even with several updates per iteration",
    )
    mask_eos: bool = Field(
        False, description="do not imitate on the end-of-sequence token, in case chat templates differ"
    )

    @property
    def teacher_writes(self) -> bool:
        return self.student_share < 1 and self.others == "teacher"

    @property
    def scores_given(self) -> bool:
        return self.divergence.sampler_top_k > 0

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
            why = "is sampled, which is correct only on the student's own samples; set algorithm.student_share: 1"
            found.append(("algorithm.divergence.tier", why))
        if self.student_share < 1 and self.divergence.sampler_top_k:
            why = (
                "is sampler, but completions by others have no sampler (algorithm.student_share < 1); set it to teacher"
            )
            found.append(("algorithm.divergence.support", why))
        if self.student_share < 1 and self.group_size > 1:
            why = f"is {self.group_size}, but others complete a prompt once (algorithm.student_share < 1); set it to 1"
            found.append(("algorithm.group_size", why))
        if self.student_share < 1 and self.others == "data" and config.data.completion_column is None:
            why = f"is {self.student_share}, but data.completion_column is null; name the column of the completions"
            found.append(("algorithm.student_share", why))
        return found
