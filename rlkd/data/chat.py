"""Tokenizers: a prompt and a completion as the student reads them, and whether two vocabularies are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlkd.config.schema import DataConfig
from rlkd.data import control
from rlkd.data.rows import LAST_BY_ASSISTANT
from rlkd.distributed import RunStopped
from rlkd.types import Prompt

Messages = tuple[Mapping[str, Any], ...]
NOTHING: Mapping[str, Any] = MappingProxyType({})

_PLACE = "rlkd-place-of-the-text"
_ASKS_FOR_NONE = re.compile(r"content['\"\]]*\s+is\s+(not\s+)?none", re.IGNORECASE)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, a hub id, or builtin:student and builtin:teacher.

    Raises: ValueError, one line, if there is none.
    """
    from rlkd import builtin as tiny

    try:
        tokenizer = AutoTokenizer.from_pretrained(tiny.resolve(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {path!r}: {' '.join(str(error).split())[:300]}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A prompt as the student reads it."""

    messages: Messages
    token_ids: tuple[int, ...]
    text: str
    """The text of `token_ids`, with the marks of `control.marked`, without an added beginning-of-sequence token."""
    marked_messages: Messages
    """`messages` with the marks of `control.marked`."""
    variables: Mapping[str, Any]
    """The other variables of the chat template, with the same marks."""
    chat_template: bool


def read_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, Any]],
    system: str | None = None,
    chat_template: bool = True,
    *,
    variables: Mapping[str, Any] = NOTHING,
    continue_final: bool = False,
    spelled_tokens: bool = False,
) -> Reading:
    """The prompt, up to the place where the model starts to write.

    A text becomes the user's message, after `system` if there is one. With a chat template the ids are those of the
    rendered conversation, in which the template has written its special tokens. Without one they are those of the
    plain text, after a beginning-of-sequence token if the tokenizer puts one before a text.

    Args:
        variables: the variables of the chat template besides the messages: tools, and its own.
        continue_final: if the last message is the assistant's, the model continues it; False: that is refused.
        spelled_tokens: text that spells a control token becomes that token; False: it stays text.

    Example: read_prompt(tokenizer, "reverse: abc", chat_template=False).token_ids.
    Raises: ValueError, one line.
    """
    messages = _messages(prompt, system)
    marked_messages, marked_variables = messages, variables
    if not spelled_tokens:
        marked_messages = tuple(control.marked(tokenizer, messages))
        if "tools" in variables:  # all other variables come from the config
            marked_variables = {**variables, "tools": control.marked(tokenizer, variables["tools"])}
    if chat_template:
        if messages[-1]["role"] == "assistant" and not continue_final:
            raise ValueError(LAST_BY_ASSISTANT)
        text = _rendered(tokenizer, marked_messages, marked_variables)
        # The template has written all special tokens, including the beginning of sequence, so none are added.
        ids = tuple(control.encode(tokenizer, text))
    elif len(messages) != 1 or not isinstance(prompt, str):
        raise ValueError(
            "without a chat template a prompt is one text: a list of messages, or data.system, needs "
            "data.chat_template: true"
        )
    else:
        text = marked_messages[0]["content"]
        ids = _plain(tokenizer, text)
    return Reading(
        messages=messages,
        token_ids=ids,
        text=text,
        marked_messages=marked_messages,
        variables=marked_variables,
        chat_template=chat_template,
    )


def read_as_configured(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    system: str | None = None,
) -> Reading:
    """`read_prompt` with the settings of the section `data`. `variables`: data.template_variables and the tools."""
    return read_prompt(
        tokenizer,
        prompt,
        system,
        data.chat_template,
        variables=variables,
        continue_final=data.continue_final_message,
        spelled_tokens=data.special_tokens == "tokens",
    )


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Reading, text: str, ends: Sequence[int]
) -> tuple[int, ...]:
    """The ids of a completion of `prompt`, as the student would have to generate them: up to one token of `ends`.

    With a chat template they are those of the assistant's turn as the template renders it with this `text`, from the
    end of the prompt up to the first token of `ends`. If the template ends a turn with none of them, what it writes
    there is replaced by the first of `ends`. Special tokens that `text` spells become those tokens, except `ends`: one
    at the very end is not doubled, and earlier ones stay text.

    Raises: ValueError, one line.
    """
    names = [name for name in map(tokenizer.convert_ids_to_tokens, ends) if isinstance(name, str)]
    content = next((text.removesuffix(name) for name in names if text.endswith(name)), text)
    content = control.marked(tokenizer, content, only=names)
    closing, rest = "", content
    if prompt.chat_template:
        before, opened = _turn(prompt.marked_messages)
        whole = _rendered(
            tokenizer, (*before, opened | {"content": f"{opened['content']}{content}"}), prompt.variables, False
        )
        other = _rendered(tokenizer, (*before, opened | {"content": _PLACE}), prompt.variables, False)
        closing = other.rpartition(_PLACE)[2] if _PLACE in other else ""
        # A template may open a new turn differently from a finished one, for example with a <think> of its own.
        rest = whole[len(prompt.text) :] if whole.startswith(prompt.text) else content + closing
        if content.strip() not in rest:  # or drop a part as a thought, which is to be learnt too
            rest = content + closing
    (ids,) = encode_after(tokenizer, prompt.text, [rest])
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    if end is not None:
        return tuple(ids[: end + 1])
    (ids,) = encode_after(tokenizer, prompt.text, [rest.removesuffix(closing)])
    return (*ids, tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0])


def encode_after(tokenizer: PreTrainedTokenizerBase, before: str, texts: Sequence[str]) -> list[list[int]]:
    """The ids of `texts`, which follow `before` one after another. The ids of `before` do not change.

    A tokenizer may put a blank before a text that is encoded alone, or join letters of two texts in one token; such a
    token belongs to the later text.
    """
    joined = "".join(texts)
    for anchor in filter(None, (before, "\n", "a", ".")):
        head, whole = control.encode(tokenizer, anchor), control.encode(tokenizer, anchor + joined)
        if whole[: len(head)] == head:
            break
    else:  # every text before it changes its tokens, so it is encoded alone
        anchor, head, whole = "", [], control.encode(tokenizer, joined)
    cuts = [len(head)]
    for last in range(1, len(texts)):
        part = control.encode(tokenizer, anchor + "".join(texts[:last]))
        same = next(
            (i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole))
        )
        cuts.append(max(cuts[-1], same))
    return [whole[start:end] for start, end in zip(cuts, [*cuts[1:], len(whole)], strict=True)]


def mentions(tokenizer: PreTrainedTokenizerBase, name: str, tools: bool = False) -> bool:
    """Whether the chat template mentions `name`, as a variable or a field of the messages."""
    template = tokenizer.get_chat_template(None, [{}] if tools else None)
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """`token_ids` as text, including all special tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def token_ends(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], text: str, alone: dict[int, str]
) -> list[int]:
    """Where each token ends in `text`, which is `decode` of them: the number of its characters up to there.

    A token that holds part of a character ends where it begins, and the one that completes the character has it. The
    last token ends with the text.

    Args:
        alone: the texts of single tokens, to which those of these tokens are added; start with an empty one.
    """
    for token in token_ids:
        if token not in alone:
            alone[token] = decode(tokenizer, [token])
    if "".join(alone[token] for token in token_ids) == text:
        return list(accumulate(len(alone[token]) for token in token_ids))
    ends: list[int] = []
    start = at = 0  # the first token without a text of its own yet, and where its text begins
    for t in range(len(token_ids)):
        # Decoded after the token before, since the first of a text may lose its space.
        before = decode(tokenizer, token_ids[start - 1 : start]) if start else ""
        piece = decode(tokenizer, token_ids[max(start - 1, 0) : t + 1])[len(before) :]
        if piece and text.startswith(piece, at):
            at, start = at + len(piece), t + 1
        elif t - start == 8:  # longer than any character; the text of these tokens is unknown
            start = t + 1
        ends.append(at)
    return [*ends[:-1], len(text)]


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], finish_reason: str) -> str:
    """A completion as rewards and teachers read it: the text without the end token that stopped it.

    Other special tokens stay, since <think> is one in many vocabularies. `finish_reason` as in `Rollout`.
    """
    return decode(tokenizer, token_ids[:-1] if finish_reason == "stop" else token_ids)


@contextmanager
def refusing(prompt: Prompt) -> Iterator[None]:
    """A context around the rendering of a teacher's view of `prompt`, which happens during the run.

    Raises: RunStopped if the chat template refuses it, since preflight checked only the student's prompts.
    """
    try:
        yield
    except ValueError as error:
        raise RunStopped(
            f"prompt {prompt.id!r}: expected a chat template that renders what the teacher is shown, got: {error}; "
            "change the template of algorithm.context or algorithm.feedback, or the tokenizer's chat template"
        ) from error


def last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The content of the last message by the user; of the last message if no user wrote one.

    If the content is a list of parts, their texts are joined.
    """
    if not messages:
        return ""
    asked = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
    content = asked.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def filled(template: str, values: Mapping[str, str]) -> str:
    r"""`template` with each {name} of `values` replaced, in one pass.

    All other braces, such as those of \boxed{}, and braces in the values, stay as they are.
    Example: filled("{question} {x}", {"question": "{x}?"}) is "{x}? {x}".
    """
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


def _messages(prompt: str | Sequence[Mapping[str, Any]], system: str | None) -> Messages:
    if isinstance(prompt, str):
        before = () if system is None else ({"role": "system", "content": system},)
        return (*before, {"role": "user", "content": prompt})
    if system is not None:
        raise ValueError("data.system is for text prompts; this one is a list of messages: put a system message in it")
    return tuple(prompt)


def _turn(messages: Messages) -> tuple[Messages, dict[str, Any]]:
    """The messages before the assistant's turn that a completion belongs to, and the existing part of this turn."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], {**messages[-1], "content": messages[-1].get("content") or ""}
    return messages, {"role": "assistant", "content": ""}


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, variables: Mapping[str, Any], to_be_continued: bool = True
) -> str:
    """The conversation in the chat template, up to where the model starts to write or the last message ends."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, but data.chat_template is true; set data.chat_template: false to "
            "use prompts as plain text"
        )
    # A message with tool calls may have no content, which most templates would write as the word None.
    template = tokenizer.get_chat_template(None, variables.get("tools"))
    nothing = None if _ASKS_FOR_NONE.search(template) else ""
    shown = [{**m, "content": nothing} if m.get("content") is None else dict(m) for m in messages]
    begun = to_be_continued and shown[-1]["role"] == "assistant"
    if begun:
        shown[-1]["content"] = shown[-1]["content"] or ""
    try:
        text = tokenizer.apply_chat_template(
            shown,
            add_generation_prompt=to_be_continued and not begun,
            continue_final_message=begun,
            tokenize=False,
            **variables,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template refuses a prompt: {' '.join(str(error).split())[:300]}") from error
    assert isinstance(text, str)
    return text


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    ids = control.encode(tokenizer, text)
    bos = tokenizer.bos_token_id
    # Tested on the empty text, since encoding `text` with special tokens might add an end of sequence too.
    starts_with_bos = bos is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [bos]
    return tuple([bos, *ids] if starts_with_bos and ids[:1] != [bos] else ids)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def first_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """A description of the lowest id with different tokens in `a` and `b`; None if there is no such id.

    Padding rows of the embeddings do not count, only the tokenizers' ids.
    Example: "token 151665 is '<think>' in the first tokenizer, but unused in the second".
    """
    left, right = _tokens(a), _tokens(b)
    different = [index for index in left.keys() | right.keys() if left.get(index) != right.get(index)]
    if not different:
        return None
    index = min(different)
    in_a, in_b = (repr(tokens[index]) if index in tokens else "unused" for tokens in (left, right))
    return f"token {index} is {in_a} in the first tokenizer, but {in_b} in the second"
