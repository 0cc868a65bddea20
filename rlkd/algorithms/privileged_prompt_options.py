"""The section `context` of the self-distillation algorithms, OPSD and SDPO."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from rlkd.config.schema import Section


class ContextConfig(Section):
    """The privileged prompt: its template, and a template for each part of its {context}."""

    template: str = Field(
        "{prompt}\n\n{context}\n\nWork through the problem in your own words, step by step, to its answer.",
        description="the privileged prompt; {prompt} and {context} are filled in",
    )
    reference: str | None = Field(
        None, description="template of the reference solution (data.privileged_column), as {text}; null: not shown"
    )
    sibling: str | None = Field(
        None, description="template of another, correct completion of the same prompt, as {text}; null: not shown"
    )
    feedback: str | None = Field(
        None, description="template of the reward functions' feedback on the completion, as {text}; null: not shown"
    )
    feedback_beside_sibling: bool = Field(
        True, description="show feedback together with a sibling; false: only if there is no sibling to show"
    )
    drop: str = Field(
        r"(?s)<think>.*?</think>\s*", description="regular expression; its matches are removed from a sibling"
    )
    max_tokens: int = Field(
        2048, ge=1, description="longest privileged prompt, in tokens; a longer one is treated as having no context"
    )

    @field_validator("template")
    @classmethod
    def _has_the_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("expected a template with {prompt}; put it where the student's prompt belongs")
        return value

    @field_validator("reference", "sibling", "feedback")
    @classmethod
    def _has_the_text(cls, value: str | None) -> str | None:
        if value is not None and "{text}" not in value:
            raise ValueError("expected a template with {text}; or set null to omit this part")
        return value

    @field_validator("drop")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"expected a regular expression ({error})") from error
        return value

    def parts(self, reference: str | None, sibling: str | None, feedback: str | None) -> list[str]:
        """The filled templates, for those parts that are configured and available."""
        from rlkd.data.chat import filled  # imported here so that reading options needs no transformers

        if sibling is not None:
            sibling = re.sub(self.drop, "", sibling)
            if self.sibling is not None and not self.feedback_beside_sibling:
                feedback = None
        pairs = ((self.reference, reference), (self.sibling, sibling), (self.feedback, feedback))
        return [filled(part, {"text": text}) for part, text in pairs if part is not None and text is not None]
