"""The section `algorithm` of TAID."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.algorithms.opd_options import OPDConfig
from rlkd.config.schema import Config


class TAIDConfig(OPDConfig):
    """Temporally adaptive interpolated distillation (arXiv 2501.16937), on the completions of the data."""

    name: Literal["taid"] = Field(description="taid")  # type: ignore[assignment]
    group_size: int = Field(1, ge=1, description="completions per prompt")
    student_share: float = Field(0.0, ge=0, le=1, description="share of prompts that the student completes; paper: 0")
    divergence: DivergenceConfig = Field(
        DivergenceConfig(kind="forward_kl"), description="of the interpolated teacher; full, or student_top_k"
    )
    t_start: float = Field(0.4, ge=0, le=1, description="the teacher's share of the logits at the start")
    t_end: float = Field(1.0, ge=0, le=1, description="its largest share")
    over: int = Field(1000, ge=1, description="iterations in which t rises to t_end at the latest, in a straight line")
    step: float = Field(5e-4, ge=0, description="α: largest adaptive step of t in an iteration")
    momentum: float = Field(0.99, ge=0, lt=1, description="β: of the loss's relative change")

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        if not self.divergence.needs_distribution:
            why = "needs the teacher's whole distribution to interpolate; use full, or top_k with support: student"
            found.append(("algorithm.divergence.tier", why))
        if self.t_end < self.t_start:
            found.append(("algorithm.t_end", f"is {self.t_end}, below algorithm.t_start = {self.t_start}; raise it"))
        return found
