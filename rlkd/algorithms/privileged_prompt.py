"""What a privileged reader is shown beside the prompt: templates, filled in one pass.

Shared by the algorithms in which the student teaches itself (OPSD, SDPO).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlkd.config.schema import DataConfig
from rlkd.data.chat import filled, read_as_configured
from rlkd.types import Prompt


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
    return read_as_configured(data, tokenizer, shown, prompt.variables).token_ids
