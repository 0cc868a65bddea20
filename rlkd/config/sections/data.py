"""The section `data`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from rlkd.config.sections.base import Section


class MessageKeys(Section):
    """How the messages of the data are written, where it is not as role and content."""

    role: str = Field("role", description="key of a message's author, e.g. from")
    content: str = Field("content", description="key of a message's text, e.g. value")
    roles: dict[str, str] = Field(
        {}, description="author in the data → role in the chat template, e.g. {human: user, gpt: assistant}"
    )


class DataConfig(Section):
    """Prompts and their answers.

    A column may stand in another: `meta.gold.value` is `value` of `gold` of the column `meta`. A column that has the
    whole name, dots included, comes first.
    """

    path: str = Field(description="a .jsonl file, a folder or hub id of a Hugging Face data set, or builtin:reverse")
    split: str = Field("train", description="split of a Hugging Face data set")
    prompt_column: str = Field(
        "prompt", description="column with the prompt: a text, or a list of chat messages; a.b.c: within another column"
    )
    answer_column: str | None = Field("answer", description="column with the reference answer; null: none")
    privileged_column: str | None = Field(None, description="column that only a teacher may see, e.g. a solution")
    completion_column: str | None = Field(None, description="column with a completion to imitate (SFT, GKD, REDI)")
    rejected_column: str | None = Field(None, description="column with a completion to avoid (REDI)")
    id_column: str | None = Field(None, description="column with a unique id; null: the row number")
    tools_column: str | None = Field(
        None, description="column with the tools of a prompt for the chat template: a list, or its JSON; null: none"
    )
    messages: MessageKeys = Field(MessageKeys(), description="how the messages in the prompt column are written")
    chat_template: bool = Field(True, description="wrap the prompt in the student's chat template; false: plain text")
    template_variables: dict[str, Any] = Field(
        {}, description="variables of the chat template, e.g. {enable_thinking: false}; teachers' prompts get them too"
    )
    continue_final_message: bool = Field(
        False,
        description="where the last message is by the assistant, the student goes on with it; false: it is refused",
    )
    special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="what a prompt that spells a special token, such as <|im_end|>, has there: text; or the token, for "
        "prompts that were put into a template beforehand",
    )
    system: str | None = Field(None, description="system message put before a text prompt")
    limit: int | None = Field(None, ge=1, description="use only the first rows")
    max_prompt_tokens: int = Field(1024, ge=1, description="longest prompt, in tokens")
    max_completion_tokens: int = Field(4096, ge=1, description="longest completion in the data, in tokens")
    too_long: Literal["error", "skip"] = Field(
        "error", description="what to do with a row whose prompt or completion is longer"
    )

    @field_validator("template_variables")
    @classmethod
    def _are_the_templates(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(value.keys() & _NO_TEMPLATE_VARIABLES)
        if taken:
            raise ValueError(f"expected variables of the chat template, got {taken[0]}, which other keys of data set")
        return value


_NO_TEMPLATE_VARIABLES = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        "return_assistant_tokens_mask",
    )
)
"""What `apply_chat_template` takes for itself."""
