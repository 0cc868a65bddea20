"""What a privileged reader is shown beside the prompt: templates, filled in one pass.

Shared by the algorithms in which the student teaches itself (OPSD, SDPO).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerBase

from rlkd.config.schema import DataConfig, Section
from rlkd.data.chat import filled, read_as_configured, refusing
from rlkd.types import Prompt


class ContextConfig(Section):
    """The privileged prompt: the template, and what each part of its {context} looks like."""

    template: str = Field(
        "{prompt}\n\n{context}\n\nWork through the problem in your own words, step by step, to its answer.",
        description="the privileged prompt; {prompt} and {context} are filled in",
    )
    reference: str | None = Field(
        None, description="part with the reference solution (data.privileged_column) as {text}; null: not shown"
    )
    sibling: str | None = Field(
        None, description="part with a correct completion of the same prompt, another one, as {text}; null: not shown"
    )
    feedback: str | None = Field(
        None, description="part with what the rewards said of the completion, as {text}; null: not shown"
    )
    feedback_beside_sibling: bool = Field(
        True, description="show feedback beside a sibling too; false: only where there is no sibling to show"
    )
    drop: str = Field(
        r"(?s)<think>.*?</think>\s*", description="what this regular expression matches is left out of a sibling"
    )
    max_tokens: int = Field(
        2048, ge=1, description="longest privileged prompt, in tokens; longer: as if there were no context"
    )

    @field_validator("template")
    @classmethod
    def _has_the_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("wants {prompt} in it, where the student's prompt stands")
        return value

    @field_validator("reference", "sibling", "feedback")
    @classmethod
    def _has_the_text(cls, value: str | None) -> str | None:
        if value is not None and "{text}" not in value:
            raise ValueError("wants {text} in it; null leaves the part out")
        return value

    @field_validator("drop")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return value

    def parts(self, reference: str | None, sibling: str | None, feedback: str | None) -> list[str]:
        """The parts that are asked for and to be had."""
        if sibling is not None:
            sibling = re.sub(self.drop, "", sibling)
            if self.sibling is not None and not self.feedback_beside_sibling:
                feedback = None
        pairs = ((self.reference, reference), (self.sibling, sibling), (self.feedback, feedback))
        return [filled(part, {"text": text}) for part, text in pairs if part is not None and text is not None]


def privileged_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: str, parts: Sequence[str], data: DataConfig
) -> tuple[int, ...]:
    """Token ids of `prompt` with what the user said last put into `template`, beside the `parts`.

    All else stays: tools, what tools returned since, and an answer that the student goes on with.
    """
    messages = list(prompt.messages)
    asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
    told = {"prompt": messages[asked]["content"] or "", "context": "".join(parts)}
    messages[asked] = {**messages[asked], "content": filled(template, told)}
    shown = messages if data.chat_template else messages[asked]["content"]
    with refusing(prompt):
        return read_as_configured(data, tokenizer, shown, prompt.variables).token_ids
