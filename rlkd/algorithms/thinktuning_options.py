"""The section `algorithm` of ThinkTuning: GRPO's options and the teacher's feedback."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.algorithms.feedback_options import FeedbackConfig
from rlkd.algorithms.grpo_options import GRPOConfig
from rlkd.config.schedules import Linear, Schedule
from rlkd.config.schema import Config, NoTeacherConfig

Rule = Literal["ppo", "shaped", "sft", "mask"]


class ThinkTuningConfig(GRPOConfig):
    """ThinkTuning (arXiv 2508.07616): GRPO in which a teacher's feedback is appended to some rollouts."""

    name: Literal["thinktuning"] = Field(description="thinktuning")  # type: ignore[assignment]
    guided: Schedule = Field(
        Linear(kind="linear", start=0.1, end=0.01, over=100),
        description="fraction of a prompt's finished completions that get feedback, a number or a schedule over "
        "iterations",
    )
    off_below: float = Field(0.06, ge=0, description="no feedback (plain GRPO) if `guided` is at or below this")
    at_least: int = Field(1, ge=0, description="minimum number of completions per prompt that get feedback")
    feedback: FeedbackConfig = Field(FeedbackConfig(), description="how the teacher is prompted for feedback")
    max_augmented_tokens: int | None = Field(
        None,
        ge=1,
        description="longest completion including feedback; null: rollout.max_tokens + algorithm.feedback.max_tokens",
    )
    teacher_tokens: Rule = Field(
        "ppo",
        description="loss on the teacher's tokens: ppo (clipped surrogate, old = the trainer's own), shaped (advantage-"
        "aware shaping), sft (cross-entropy where the advantage is positive), or mask (none)",
    )
    glue_tokens: Rule | None = Field(
        None, description="loss on the separators (glue) before them; null: as algorithm.teacher_tokens"
    )
    shaping: list[float] = Field(
        [0.0, 0.1],
        min_length=2,
        max_length=2,
        description="shaped: γ at advantages of 4 and −4; a larger γ gives a smaller gradient",
    )

    @property
    def teacher_writes(self) -> bool:
        return True

    def augmented_tokens(self, config: Config) -> int:
        """Maximum tokens of a completion including its feedback."""
        default = config.rollout.max_tokens + self.feedback.max_tokens
        return default if self.max_augmented_tokens is None else self.max_augmented_tokens

    def trained_lengths(self, config: Config) -> dict[str, int]:
        completion = max(self.augmented_tokens(config), config.rollout.max_tokens)
        return {"data.max_prompt_tokens": config.data.max_prompt_tokens, "algorithm.max_augmented_tokens": completion}

    def teacher_lengths(self, config: Config) -> dict[str, int]:
        asked = self.feedback
        return {
            "algorithm.feedback.max_prompt_tokens": asked.max_prompt_tokens,
            "algorithm.feedback.max_tokens": asked.max_tokens,
        }

    def problems(self, config: Config) -> list[tuple[str, str]]:
        found = super().problems(config)
        asked, (low, high) = self.feedback, self.shaping
        if isinstance(config.teacher, NoTeacherConfig):
            why = "is none, but algorithm.name thinktuning needs a teacher to write feedback; set it to local, "
            "served or self"
            found.append(("teacher.backend", why))
        if not asked.chat_template and (asked.system is not None or asked.behaviours):
            why = "is false, but system messages and examples need a chat template; set system: null, behaviours: []"
            found.append(("algorithm.feedback.chat_template", why))
        if not 0 <= low <= high:
            why = f"expected 0 <= first <= second, got [{low}, {high}]; otherwise π / (π + γ) has no bound"
            found.append(("algorithm.shaping", why))
        return found
