"""SDPO: self-distillation from a correct sibling completion, or from feedback of the environment."""

from __future__ import annotations

from typing import ClassVar

from rlkd.algorithms.opsd import OPSD
from rlkd.algorithms.sdpo_options import SDPOConfig
from rlkd.config.schema import AlgorithmConfig


class SDPO(OPSD):
    """L(θ) = E_{y_1…y_G ~ π_θ(·|x)} [ Σ_i Σ_t D( q(·|x, f_i, y_i,<t), π_θ(·|x, y_i,<t) ) / N ]

    arXiv 2601.20802: q is the student's own moving average, which reads f_i before the completion: a correct completion
    of the same prompt (another one), or if there is none, the rewards' feedback on y_i. D is the JSD(½) over the
    student's 100 most likely tokens and one entry for the rest. Completions without f_i are masked: N counts the
    others' tokens. As in the authors' code each token counts min(π/π_old, 2) · min(π_old/π_sampler, 2) times, detached.
    """

    Options: ClassVar[type[AlgorithmConfig]] = SDPOConfig
