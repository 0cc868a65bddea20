"""The section `algorithm` of SDPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.algorithms.opsd_options import OPSDConfig
from rlkd.algorithms.privileged_prompt_options import ContextConfig
from rlkd.config.kinds import Reduction


class SDPOConfig(OPSDConfig):
    """SDPO (arXiv 2601.20802). Typical teacher: {backend: self, weights: ema, decay: 0.95}."""

    name: Literal["sdpo"] = Field(description="sdpo")  # type: ignore[assignment]
    group_size: int = Field(8, ge=2, description="completions per prompt")
    divergence: DivergenceConfig = Field(
        DivergenceConfig(tier="top_k", kind="jsd", beta=0.5, k=100, support="student"),
        description="the divergence that is minimised at each token",
    )
    reduction: Reduction = Field(
        "token_mean",
        description="average over all tokens of completions with a context, over tokens per sequence then "
        "sequences, or as in dr_grpo",
    )
    ratio_cap: float | None = Field(
        2.0,
        gt=0,
        description="full, top_k: weight each token by min(π/π_old, cap) · min(π_old/π_sampler, cap); null: no "
        "weighting",
    )
    context: ContextConfig = Field(
        ContextConfig(
            template="{prompt}\n\n{context}\n\nSolve the problem above once more, correctly.",
            sibling="A correct attempt:\n{text}\n",
            feedback="What came of the last attempt:\n{text}\n",
            feedback_beside_sibling=False,
        ),
        description="context shown only to the teacher",
    )
