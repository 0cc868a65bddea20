"""The section `algorithm` of TAID."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.algorithms.opd_options import OPDConfig
from rlkd.config.schema import Config


class TAIDConfig(OPDConfig):
    """Temporally adaptive interpolated distillation (arXiv 2501.16937), on completions from the data."""

    name: Literal["taid"] = Field(description="taid")  # type: ignore[assignment]
    group_size: int = Field(1, ge=1, description="completions per prompt")
    student_share: float = Field(
        0.0, ge=0, le=1, description="fraction of prompts that the student completes; 0 in the paper"
    )
    divergence: DivergenceConfig = Field(
        DivergenceConfig(kind="forward_kl"),
        description="divergence to the interpolated teacher; tier: full, or top_k with support: student",
    )
    t_start: float = Field(0.4, ge=0, le=1, description="initial weight t of the teacher's logits")
    t_end: float = Field(1.0, ge=0, le=1, description="largest t")
    over: int = Field(
        1000, ge=1, description="t rises at least linearly, from t_start to t_end in this many iterations"
    )
    step: float = Field(5e-4, ge=0, description="α: largest adaptive step of t per iteration")
    momentum: float = Field(0.99, ge=0, lt=1, description="β: momentum of the relative change of the loss")

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        if not self.divergence.needs_distribution:
            why = "must be a tier with the teacher's full distribution, to interpolate; use full, or top_k with "
            "support: student"
            found.append(("algorithm.divergence.tier", why))
        if self.t_end < self.t_start:
            found.append(("algorithm.t_end", f"is {self.t_end}, below algorithm.t_start = {self.t_start}; raise it"))
        return found
