"""The section `data`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlkd.config.sections.base import Section


class MessageKeys(Section):
    """Names used by chat messages in the data, if they are not role and content."""

    role: str = Field("role", description="key that holds a message's author, e.g. from")
    content: str = Field("content", description="key that holds a message's text, e.g. value")
    roles: dict[str, str] = Field(
        {}, description="author in the data → role in the chat template, e.g. {human: user, gpt: assistant}"
    )


class DataConfig(Section):
    """Prompts and their answers.

    Columns may be nested: `meta.gold.value` is `value` in `gold` in the column `meta`. A column whose own name is
    `meta.gold.value` takes precedence.
    """

    path: str = Field(
        description="a .jsonl, .csv or .parquet file, a folder or hub id of a Hugging Face dataset, builtin:reverse, "
        "or your own module:Class; gsm8k:PATH or math-500:PATH reads the columns of these benchmarks"
    )
    mix: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        {}, description="other data, read like data.path → its share of each iteration's prompts, e.g. {b.jsonl: 0.25}"
    )
    split: str = Field("train", description="split of a Hugging Face dataset, or what your own class is called with")
    prompt_column: str = Field(
        "prompt", description="column with the prompt: a string or a list of chat messages; a.b.c is a nested column"
    )
    answer_column: str | None = Field("answer", description="column with the reference answer; null: none")
    privileged_column: str | None = Field(None, description="column shown only to a teacher, e.g. a solution")
    completion_column: str | None = Field(None, description="column with a completion to imitate (SFT, GKD, REDI)")
    rejected_column: str | None = Field(None, description="column with a completion to avoid (REDI)")
    id_column: str | None = Field(None, description="column with a unique id; null: the row number")
    tools_column: str | None = Field(
        None, description="column with a prompt's tools for the chat template, as a list or as JSON; null: none"
    )
    messages: MessageKeys = Field(MessageKeys(), description="key names of the messages in the prompt column")
    chat_template: bool = Field(True, description="apply the student's chat template to the prompt; false: plain text")
    template_variables: dict[str, Any] = Field(
        {},
        description="variables for the chat template, e.g. {enable_thinking: false}; also used for teachers' prompts",
    )
    continue_final_message: bool = Field(
        False,
        description="if the last message is from the assistant, the student continues it; false: this is an error",
    )
    special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="how to encode a special token such as <|im_end|> written in a prompt: as text, or as the "
        "token, for "
        "prompts that already have a chat template applied",
    )
    system: str | None = Field(None, description="system message added before a string prompt")
    limit: int | None = Field(None, ge=1, description="use only this many rows, from the first")
    max_prompt_tokens: int = Field(1024, ge=1, description="longest prompt, in tokens")
    max_completion_tokens: int = Field(4096, ge=1, description="longest completion in the data, in tokens")
    too_long: Literal["error", "skip"] = Field(
        "error", description="what to do with a row whose prompt or completion is too long"
    )

    @field_validator("mix")
    @classmethod
    def _leaves_a_share(cls, value: dict[str, float]) -> dict[str, float]:
        if sum(value.values()) >= 1:
            raise ValueError(f"expected shares that leave some for data.path, got a sum of {sum(value.values()):g}")
        return value

    @field_validator("template_variables")
    @classmethod
    def _are_template_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(value.keys() & _NO_TEMPLATE_VARIABLES)
        if taken:
            raise ValueError(f"expected chat template variables, got {taken[0]}, which rlkd sets itself; remove it")
        return value


_NO_TEMPLATE_VARIABLES = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        "return_assistant_tokens_mask",
    )
)
"""Arguments of `apply_chat_template`."""
