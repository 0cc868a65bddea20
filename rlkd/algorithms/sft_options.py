"""The section `algorithm` of SFT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.config.kinds import Reduction
from rlkd.config.schema import AlgorithmConfig, Config


class SFTConfig(AlgorithmConfig):
    """Supervised fine-tuning on `data.completion_column`."""

    name: Literal["sft"] = Field(description="sft")
    group_size: Literal[1] = Field(1, description="one completion per prompt, from the data")
    reduction: Reduction = Field(
        "token_mean",
        description="average over all tokens, over tokens per sequence then sequences, or over sequences × longest "
        "completion",
    )

    def trained_lengths(self, config: Config) -> dict[str, int]:
        return {
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
            "data.max_completion_tokens": config.data.max_completion_tokens,
        }

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        if config.data.completion_column is None:
            why = f"is null, but algorithm.name {self.name} trains on completions from the data; set it to their column"
            found.append(("data.completion_column", why))
        return found
