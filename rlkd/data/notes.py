"""Notices about a data set, such as text that spells special tokens, or fields that the chat template never uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlkd.config.schema import DataConfig
from rlkd.data import control
from rlkd.data.chat import read_as_configured
from rlkd.data.rows import Row
from rlkd.types import Prompt

_LOOKED_AT = 32
"""Number of prompts that are compared to find out whether the chat template uses a field."""


class Notes:
    """Counts what the user should know, although it is not a fault."""

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._unread: Counter[str] = Counter()
        self._looked: Counter[str] = Counter()

    def look(self, row: Row, prompt: Prompt) -> None:
        """Count one more row. `prompt`: the row as the student reads it."""
        for kind, token in zip(
            ("spelled", "ambiguous"), control.spelled(self._tokenizer, [row.prompt, row.tools]), strict=True
        ):
            if token is not None:
                self._counts[kind] += 1
                self._examples.setdefault(kind, token)
        if isinstance(row.prompt, str) and row.tools is None:
            return
        fields = {name for message in prompt.messages for name in message} - {"role", "content"}
        for name in sorted(fields):
            others = [{key: value for key, value in m.items() if key != name} for m in prompt.messages]
            self._compare(f"messages with {name!r}", prompt, others, prompt.variables)
        if row.tools is not None:
            variables = {key: value for key, value in prompt.variables.items() if key != "tools"}
            self._compare("tools", prompt, prompt.messages, variables)

    def _compare(
        self, what: str, prompt: Prompt, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> None:
        """Compare the prompt with its reading without the field `what`; only for the first prompts that have it."""
        self._counts[what] += 1
        if self._looked[what] == _LOOKED_AT or self._unread[what] < self._looked[what]:
            return
        self._looked[what] += 1
        if not self._data.chat_template:
            self._unread[what] += 1
            return
        try:
            same = read_as_configured(self._data, self._tokenizer, messages, variables).token_ids == prompt.token_ids
        except ValueError:  # the template requires it
            same = False
        self._unread[what] += same

    def rendered_beforehand(self, total: int) -> str | None:
        """One line if most of `total` prompts seem to be rendered already, so that their control tokens would become
        plain text, and the config does not ask for that; else None."""
        data, count = self._data, self._counts["spelled"]
        if data.chat_template or data.special_tokens == "tokens" or "special_tokens" in data.model_fields_set:
            return None
        if 2 * count <= total:
            return None
        return (
            f"expected prompts without special tokens (data.chat_template is false), got {count} of {total} that spell "
            f"one, such as {self._examples['spelled']!r}; set data.special_tokens: tokens, for prompts that were put "
            "into a template beforehand, or data.special_tokens: text to have them read as plain letters"
        )

    def lines(self, total: int) -> list[str]:
        """One line per notice. `total`: the number of prompts."""
        lines = []
        if self._counts["spelled"]:
            read = "text" if self._data.special_tokens == "text" else "that token"
            lines.append(
                f"{self._counts['spelled']} of {total} prompts spell a special token of the tokenizer, such as "
                f"{self._examples['spelled']!r}, which is read as {read} (data.special_tokens)"
            )
        if self._counts["ambiguous"]:
            lines.append(
                f"{self._counts['ambiguous']} of {total} prompts contain {self._examples['ambiguous']!r}, a special "
                "token that the tokenizer cannot tell from text: it is read as the token"
            )
        for what, looked in sorted(self._looked.items()):
            if self._unread[what] == looked:
                lines.append(
                    f"{self._counts[what]} of {total} prompts have {what}, which the chat template does not use"
                )
        return lines
