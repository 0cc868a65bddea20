"""What the section `algorithm` has whatever its name is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from rlkd.config.sections.base import Section

if TYPE_CHECKING:
    from rlkd.config.schema import Config


class AlgorithmConfig(Section):
    """What every algorithm has; each derives its own from it."""

    name: str = Field(description="the algorithm")
    group_size: int = Field(8, ge=1, description="completions per prompt")

    @property
    def sampling_rounds(self) -> int:
        """How many times `rollout.prompts` prompts an iteration may sample, to train on as many as that."""
        return 1

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher completes prompts or answers, rather than only scoring what is there."""
        return False

    def trained_lengths(self, config: Config) -> dict[str, int]:
        """Key → tokens; together they are the longest sequence that the student is trained on."""
        return {
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
            "rollout.max_tokens": config.rollout.max_tokens,
        }

    def teacher_lengths(self, config: Config) -> dict[str, int]:
        """Key → tokens; together they are the longest sequence that a teacher reads and writes."""
        return {
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
            "rollout.max_tokens": config.rollout.max_tokens,
        }

    def problems(self, config: Config) -> list[tuple[str, str]]:
        """Contradictions between this section and the rest of `config`: (key, one line) each."""
        return []
