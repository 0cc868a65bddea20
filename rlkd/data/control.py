"""Text that spells a control token, such as <|im_end|>, stays text.

Control tokens are those that the tokenizer marks as special. A chat template writes them as text too, so a rendered
conversation no longer shows who wrote them. Therefore `marked` replaces, before rendering, the first character of every
place in the data's text that spells one, and `encode` puts it back: what is spelled without a mark is the template's.
Text that spells none is not changed at all, and is encoded as the tokenizer always does.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Two of Unicode's noncharacters: no text has them by rights, and trimming, changing case and dumping as JSON keep them.
_MARK, _STAND_IN = "\ufdd0", "\ufdd1"
_MARKED = re.compile(r"(?:\ufdd0|\\ufdd0)([0-9a-f]+)z", re.IGNORECASE)


@dataclass(frozen=True)
class _Spelling:
    """Some tokens' texts, and a fast way to find where one of them begins."""

    names: frozenset[str]
    lengths: tuple[int, ...]
    starts: re.Pattern[str]

    @staticmethod
    def of(names: Collection[str]) -> _Spelling:
        lengths = tuple(sorted({len(name) for name in names}))
        starts = "".join(sorted({re.escape(name[0]) for name in names}))
        return _Spelling(frozenset(names), lengths, re.compile(f"[{starts}{_MARK}]"))

    def at(self, text: str, position: int) -> str | None:
        """Which of the names begins at `position`; None: none does."""
        parts = (text[position : position + length] for length in self.lengths)
        return next((part for part in parts if part in self.names), None)


@dataclass(frozen=True)
class _Special:
    """The special tokens of a tokenizer."""

    ids: Mapping[str, int]
    control: _Spelling
    """Those that text can spell without being them."""
    ambiguous: _Spelling
    """Those whose plain text is read as the token all the same: a letter that is marked as special, say."""
    pattern: re.Pattern[str]
    """Any added token, the longest first; as the tokenizer matches them."""


@functools.lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase, size: int) -> _Special:
    """`size`: of the vocabulary, so that a tokenizer that has got more tokens is looked at anew."""
    added = tokenizer.added_tokens_decoder
    ids = {token.content: index for index, token in added.items() if token.special and token.content}
    clear = [
        name
        for name, index in ids.items()
        if index not in tokenizer.encode(name, add_special_tokens=False, split_special_tokens=True)
    ]
    names = sorted((token.content for token in added.values() if token.content), key=len, reverse=True)
    return _Special(
        ids,
        _Spelling.of(clear),
        _Spelling.of(ids.keys() - set(clear)),
        re.compile("|".join(map(re.escape, names)) or r"(?!)"),
    )


@functools.lru_cache(maxsize=8)
def _reader(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
    """A copy that takes special tokens for text, and knows each of them by a stand-in.

    Returns: the copy, special token → its stand-in, the stand-in's id → the special token's.
    """
    reader = copy.deepcopy(tokenizer.backend_tokenizer)
    reader.no_truncation()
    reader.no_padding()
    stand_ins, back = {}, {}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special and token.content:
            name = f"{_STAND_IN}{index}{_STAND_IN}"
            flags = {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip", "normalized")}
            reader.add_tokens([AddedToken(name, special=False, **flags)])
            stand_ins[token.content] = name
            back[reader.token_to_id(name)] = index
    reader.encode_special_tokens = True
    return reader, stand_ins, back


def _every_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with each text in it, names of columns too, changed; other than a role, which is no text of the data."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(name): inner if name == "role" and isinstance(inner, str) else _every_text(inner, change)
            for name, inner in value.items()
        }
    return [_every_text(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def marked(tokenizer: PreTrainedTokenizerBase, value: Any, only: Collection[str] | None = None) -> Any:
    """`value`, a text or a tree of them, with a mark wherever it spells a control token (or one of `only`)."""
    spelling = _special(tokenizer, len(tokenizer)).control if only is None else _Spelling.of(only)

    def change(text: str) -> str:
        return spelling.starts.sub(
            lambda found: (
                f"{_MARK}{ord(found[0]):x}z" if found[0] == _MARK or spelling.at(text, found.start()) else found[0]
            ),
            text,
        )

    return _every_text(value, change)


def spelled(tokenizer: PreTrainedTokenizerBase, value: Any) -> tuple[str | None, str | None]:
    """A control token that a text in `value` spells, and a special one that cannot be told from text; None: no such."""
    special = _special(tokenizer, len(tokenizer))
    found: list[str | None] = [None, None]

    def look(text: str) -> str:
        for which, spelling in enumerate((special.control, special.ambiguous)):
            if found[which] is None and spelling.names:
                names = (spelling.at(text, place.start()) for place in spelling.starts.finditer(text))
                found[which] = next((name for name in names if name is not None), None)
        return text

    _every_text(value, look)
    return found[0], found[1]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text`, nothing added. What is marked is encoded as text, and all else as the tokenizer does."""
    if _MARKED.search(text) is None:
        return list(tokenizer.encode(text, add_special_tokens=False))
    special = _special(tokenizer, len(tokenizer))
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        reader, stand_ins, back = _reader(tokenizer, len(tokenizer))
        shown = _unmarked(special.pattern.sub(lambda found: stand_ins.get(found[0], found[0]), text))
        return [back.get(index, index) for index in reader.encode(shown, add_special_tokens=False).ids]
    ids: list[int] = []
    start = 0
    for found in [found for found in special.pattern.finditer(text) if found[0] in special.ids]:
        ids += [*_as_text(tokenizer, text[start : found.start()]), special.ids[found[0]]]
        start = found.end()
    return ids + _as_text(tokenizer, text[start:])


def _as_text(tokenizer: PreTrainedTokenizerBase, section: str) -> list[int]:
    """A tokenizer in Python encodes what stands between special tokens by itself, section by section."""
    text = _unmarked(section)
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []


def _unmarked(text: str) -> str:
    return _MARKED.sub(lambda found: chr(int(found[1], 16)), text)
