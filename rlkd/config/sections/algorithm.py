"""The base class of every `algorithm` section."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from rlkd.config.sections.base import Section

if TYPE_CHECKING:
    from rlkd.config.schema import Config


class AlgorithmConfig(Section):
    """Options of every algorithm; each algorithm's section derives from this class."""

    name: str = Field(description="the algorithm")
    group_size: int = Field(8, ge=1, description="completions per prompt")

    @property
    def sampling_rounds(self) -> int:
        """Maximum batches of `rollout.prompts` prompts to sample in order to fill one iteration."""
        return 1

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher generates text, rather than only scoring tokens."""
        return False

    @property
    def scores_given(self) -> bool:
        """Whether the teacher scores tokens that the sampler chose, which servers without a GPU cannot do."""
        return False

    def trained_lengths(self, config: Config) -> dict[str, int]:
        """Key → tokens; their sum is the longest sequence that the student is trained on."""
        return {
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
            "rollout.max_tokens": config.rollout.max_tokens,
        }

    def teacher_lengths(self, config: Config) -> dict[str, int]:
        """Key → tokens; their sum is the longest sequence that a teacher reads and writes."""
        return {
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
            "rollout.max_tokens": config.rollout.max_tokens,
        }

    def problems(self, config: Config) -> list[tuple[str, str]]:
        """Contradictions between this section and the rest of `config`: (key, one-line message)."""
        return []
