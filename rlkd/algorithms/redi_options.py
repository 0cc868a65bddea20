"""The section `algorithm` of REDI."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.sft_options import SFTConfig
from rlkd.config.schema import Config


class REDIConfig(SFTConfig):
    """REDI (arXiv 2505.24850): trains on pairs of `data.completion_column` and `data.rejected_column`."""

    name: Literal["redi"] = Field(description="redi")  # type: ignore[assignment]
    group_size: Literal[2] = Field(2, description="two completions per prompt: the chosen and the rejected one")  # type: ignore[assignment]
    reduction: Literal["sequence_mean"] = Field(
        "sequence_mean", description="average over tokens per trace, then pairs (Eq. 5)"
    )
    alpha: float = Field(0.8, ge=0, le=1, description="α, the weight of the rejected trace; 0: SFT, 1: symmetric")

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        if config.data.rejected_column is None:
            found.append(
                ("data.rejected_column", "is null, but algorithm.name redi trains on pairs; set it to the column")
            )
        return found
