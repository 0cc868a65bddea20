"""SDPO: self-distillation from what an attempt taught: a sibling's success, or the environment's words."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.algorithms.opsd import OPSD, OPSDConfig
from rlkd.algorithms.privileged_prompt import ContextConfig
from rlkd.config.schema import AlgorithmConfig
from rlkd.losses import Reduction


class SDPOConfig(OPSDConfig):
    """SDPO (arXiv 2601.20802). Usual teacher: {backend: self, weights: ema, decay: 0.95}."""

    name: Literal["sdpo"] = Field(description="sdpo")  # type: ignore[assignment]
    group_size: int = Field(8, ge=2, description="completions per prompt")
    divergence: DivergenceConfig = Field(
        DivergenceConfig(tier="top_k", kind="jsd", beta=0.5, k=100, support="student"),
        description="what is minimised at each token",
    )
    reduction: Reduction = Field("token_mean", description="normaliser: all tokens of completions with a context, or …")
    ratio_cap: float | None = Field(
        2.0,
        gt=0,
        description="full, top_k: each token counts min(π/π_old, cap) · min(π_old/π_sampler, cap) times; null: once",
    )
    context: ContextConfig = Field(
        ContextConfig(
            template="{prompt}\n\n{context}\n\nSolve the problem above once more, correctly.",
            sibling="A correct attempt:\n{text}\n",
            feedback="What came of the last attempt:\n{text}\n",
            feedback_beside_sibling=False,
        ),
        description="what only the teacher is shown",
    )


class SDPO(OPSD):
    """L(θ) = E_{y_1…y_G ~ π_θ(·|x)} [ Σ_i Σ_t D( q(·|x, f_i, y_i,<t), π_θ(·|x, y_i,<t) ) / N ]

    arXiv 2601.20802: q is the student's own moving average, which reads f_i before the completion: a correct completion
    of the same prompt (another one), or where there is none, what the rewards said of y_i. D is the JSD(½) over the
    student's 100 likeliest tokens and one entry for the rest. Completions without f_i are masked: N counts the others'
    tokens. As in the authors' code each token counts min(π/π_old, 2) · min(π_old/π_sampler, 2) times, detached.
    """

    Options: ClassVar[type[AlgorithmConfig]] = SDPOConfig
