"""Builds the teacher's privileged prompt (reference solution, sibling, feedback).

Shared by the self-distillation algorithms (OPSD, SDPO).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlkd.config.schema import DataConfig
from rlkd.data.chat import filled, read_as_configured, refusing
from rlkd.types import Prompt


def privileged_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: str, parts: Sequence[str], data: DataConfig
) -> tuple[int, ...]:
    """Token ids of `prompt` with its last user message replaced by `template`, filled with that message and `parts`.

    Everything else is kept: tools, later tool results, and an assistant message that the student continues.
    """
    messages = list(prompt.messages)
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
    values = {"prompt": messages[last]["content"] or "", "context": "".join(parts)}
    messages[last] = {**messages[last], "content": filled(template, values)}
    content = messages if data.chat_template else messages[last]["content"]
    with refusing(prompt):
        return read_as_configured(data, tokenizer, content, prompt.variables).token_ids
