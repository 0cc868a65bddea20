"""Tokenizers: reading a prompt as the student does, and telling two vocabularies apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Messages = tuple[Mapping[str, str], ...]


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, a hub id, or builtin:student and builtin:teacher.

    Raises: ValueError, one line, where there is none.
    """
    from rlkd import tiny

    try:
        tokenizer = AutoTokenizer.from_pretrained(tiny.resolve(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {path!r}: {' '.join(str(error).split())[:300]}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    system: str | None = None,
    chat_template: bool = True,
) -> tuple[Messages, tuple[int, ...]]:
    """(messages, token ids), ending where the model is to go on writing.

    A text becomes the user's message, after `system` if there is one. With a chat template the ids are the template's,
    which writes its own special tokens. Without one they are the plain text's, after one beginning-of-sequence token
    where the tokenizer puts one before a text.

    Example: encode_prompt(tokenizer, "reverse: abc", chat_template=False).
    Raises: ValueError, one line.
    """
    messages = _messages(prompt, system)
    if not chat_template:
        if len(messages) != 1 or not isinstance(prompt, str):
            raise ValueError(
                "without a chat template a prompt is one text: a list of messages, or data.system, needs "
                "data.chat_template: true"
            )
        return messages, _plain(tokenizer, prompt)
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, but data.chat_template is true; set data.chat_template: false to "
            "use prompts as plain text"
        )
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a prompt: {' '.join(str(error).split())[:300]}") from error
    assert isinstance(text, str)
    # The template has written the special tokens, a beginning of sequence among them: none are added.
    return messages, tuple(tokenizer.encode(text, add_special_tokens=False))


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """`token_ids` as text, every special token included."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], finish_reason: str) -> str:
    """A completion as whoever judges it reads it: what was written, without the one end token that stopped it.

    Other special tokens stay: <think> is one in many vocabularies. `finish_reason` as in `Rollout`.
    """
    return decode(tokenizer, token_ids[:-1] if finish_reason == "stop" else token_ids)


def last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What was asked at last: the content of the last message by the user, or of the last one where there is none.

    A content that is no text (a list of parts) is joined from the texts in it.
    """
    if not messages:
        return ""
    asked = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
    content = asked.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def filled(template: str, values: Mapping[str, str]) -> str:
    r"""`template` with each {name} of `values` replaced, in one pass.

    All other braces (a \boxed{}, say), and braces in the values, stay as they are.
    Example: filled("{question} {x}", {"question": "{x}?"}) is "{x}? {x}".
    """
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


def _messages(prompt: str | Sequence[Mapping[str, str]], system: str | None) -> Messages:
    if isinstance(prompt, str):
        before = () if system is None else ({"role": "system", "content": system},)
        return (*before, {"role": "user", "content": prompt})
    if system is not None:
        raise ValueError("data.system is for text prompts; this one is a list of messages: put a system message in it")
    return tuple({"role": message["role"], "content": message["content"]} for message in prompt)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    # Asked of the empty text: encoding `text` with special tokens might add an end of sequence too.
    wanted = bos is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [bos]
    return tuple([bos, *ids] if wanted and ids[:1] != [bos] else ids)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def first_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """The lowest id that stands for different tokens in `a` and `b`, in words; None where the two agree.

    Only what the tokenizers know counts: models may pad their embeddings to different widths.
    Example: "token 151665 is '<think>' in the first tokenizer, but unused in the second".
    """
    left, right = _tokens(a), _tokens(b)
    different = [index for index in left.keys() | right.keys() if left.get(index) != right.get(index)]
    if not different:
        return None
    index = min(different)
    in_a, in_b = (repr(tokens[index]) if index in tokens else "unused" for tokens in (left, right))
    return f"token {index} is {in_a} in the first tokenizer, but {in_b} in the second"
