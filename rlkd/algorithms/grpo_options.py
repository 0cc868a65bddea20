"""The section `algorithm` of GRPO and its variants, which are combinations of its options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.config.kinds import Reduction
from rlkd.config.schema import AlgorithmConfig, Config


class GRPOConfig(AlgorithmConfig):
    """Group-relative policy optimisation (arXiv 2402.03300) and its variants.

    Dr. GRPO   2503.20783   normalise: false, reduction: dr_grpo
    RLOO       2402.14740   baseline: leave_one_out, normalise: false
    DAPO       2503.14476   clip_high: 0.28, overlong_cache, resample_rounds, filter: correct (token_mean is default)
    GSPO       2507.18071   ratio: sequence, reduction: sequence_mean, clip_low: 3e-4, clip_high: 4e-4
    CISPO      2506.13585   surrogate: cispo
    dual clip  1912.09729   dual_clip: 3
    """

    name: Literal["grpo"] = Field(description="grpo")
    group_size: int = Field(8, ge=2, description="completions per prompt (the group within which rewards are compared)")
    baseline: Literal["group", "leave_one_out"] = Field(
        "group",
        description="baseline of a reward: the mean of its group, or the mean of the others in the group (RLOO)",
    )
    normalise: bool = Field(
        True, description="divide advantages by the group's standard deviation; false: only subtract the mean"
    )
    overlong_cache: int = Field(
        0,
        ge=0,
        description="DAPO: length penalty, up to 1, over this many tokens before max_tokens; 0: none",
    )
    mask_truncated: bool = Field(
        False,
        description="exclude completions cut off at max_tokens from the group's statistics and give them advantage 0",
    )
    resample_rounds: int = Field(
        1,
        ge=1,
        description="DAPO: sample up to this many times rollout.prompts to find groups with a gradient; 1: no "
        "resampling",
    )
    filter: Literal["reward", "correct"] = Field(
        "reward",
        description="with resample_rounds > 1, which groups are dropped; reward: those whose rewards are all equal "
        "(before the "
        "overlong penalty); correct: those whose answers are all right or all wrong",
    )
    surrogate: Literal["clipped", "cispo"] = Field(
        "clipped",
        description="clipped: PPO's surrogate; cispo: REINFORCE weighted by a capped ratio, so every token keeps "
        "its gradient",
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="token: π/π_old of each token; sequence: its geometric mean over the completion (GSPO)"
    )
    clip_low: float = Field(0.2, ge=0, description="clipped: ε_low, the ratio is clipped below 1 − ε_low")
    clip_high: float = Field(0.2, ge=0, description="clipped: ε_high, the ratio is clipped above 1 + ε_high")
    dual_clip: float | None = Field(
        None, gt=1, description="clipped: upper bound on the ratio for negative advantages; null: no bound"
    )
    ratio_cap: float = Field(5.0, gt=0, description="cispo: cap on the ratio itself, not 1 + ε")
    reduction: Reduction = Field(
        "token_mean",
        description="average over all tokens, over tokens per sequence then sequences, or over sequences × longest "
        "completion",
    )
    entropy_coef: float = Field(0.0, ge=0, description="coefficient of the entropy bonus, a mean over all tokens")
    importance: Literal["truncate", "mask", "off"] = Field(
        "truncate",
        description="correction for sampler–trainer mismatch: cap the importance weight, drop tokens above the cap, "
        "or none",
    )
    importance_level: Literal["token", "sequence"] = Field(
        "token",
        description="importance weight between sampler and trainer per token, or per completion (consider sequence "
        "with "
        "ratio: sequence, where a token's weight changes only part of a sequence's gradient)",
    )
    importance_cap: float = Field(2.0, gt=0, description="cap on the importance weight")
    reference_coef: float = Field(0.0, ge=0, description="coefficient of a KL to the initial student; 0: none")
    reference_estimator: Literal["k2", "k3"] = Field(
        "k3",
        description="on on-policy samples k2 has the gradient of KL(π‖reference), k3 that of KL(reference‖π); "
        "neither is corrected for samples from older weights",
    )

    @property
    def sampling_rounds(self) -> int:
        return self.resample_rounds

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        if self.baseline == "leave_one_out" and self.normalise:
            why = (
                "is true, but algorithm.baseline is leave_one_out, whose advantages are not divided by the standard "
                "deviation; "
                "set algorithm.normalise: false, or algorithm.baseline: group"
            )
            found.append(("algorithm.normalise", why))
        if self.overlong_cache > config.rollout.max_tokens:
            why = (
                f"is {self.overlong_cache}, more than rollout.max_tokens = {config.rollout.max_tokens}; it counts "
                "tokens before that limit; lower it"
            )
            found.append(("algorithm.overlong_cache", why))
        if self.surrogate == "cispo" and self.dual_clip is not None:
            why = (
                f"is {self.dual_clip}, but algorithm.surrogate is cispo, which bounds the ratio by "
                f"algorithm.ratio_cap; "
                "remove it, or set algorithm.surrogate: clipped"
            )
            found.append(("algorithm.dual_clip", why))
        if self.importance == "off" and config.rollout.max_staleness > 0:
            why = (
                f"is off, but rollout.max_staleness is {config.rollout.max_staleness}, so completions are by older "
                "weights; set importance: truncate or mask, or rollout.max_staleness: 0"
            )
            found.append(("algorithm.importance", why))
        if self.importance == "off" and self.importance_level == "sequence":
            why = "is sequence, but algorithm.importance is off; remove it, or set importance: truncate or mask"
            found.append(("algorithm.importance_level", why))
        return found
