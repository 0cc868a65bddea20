"""Text that spells a control token, such as <|im_end|>, stays text.

Control tokens are those that the tokenizer treats as special. A chat template writes them as text too, so a rendered
conversation no longer shows whether the template or the data wrote them. Therefore `marked` replaces, before rendering,
the first character of every control token that the data's text spells, and `encode` puts it back: a control token
without a mark comes from the template. Text that spells none is not changed and is encoded as usual.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Two of Unicode's noncharacters: valid text has none, and stripping, changing case and dumping as JSON keep them.
_MARK, _STAND_IN = "\ufdd0", "\ufdd1"
_MARKED = re.compile(r"(?:\ufdd0|\\ufdd0)([0-9a-f]+)z", re.IGNORECASE)


@dataclass(frozen=True)
class _Spelling:
    """The texts of some tokens, and a fast search for the places where one begins."""

    names: frozenset[str]
    lengths: tuple[int, ...]
    starts: re.Pattern[str]

    @staticmethod
    def of(names: Collection[str]) -> _Spelling:
        lengths = tuple(sorted({len(name) for name in names}))
        starts = "".join(sorted({re.escape(name[0]) for name in names}))
        return _Spelling(frozenset(names), lengths, re.compile(f"[{starts}{_MARK}]"))

    def at(self, text: str, position: int) -> str | None:
        """The name that begins at `position`, or None."""
        parts = (text[position : position + length] for length in self.lengths)
        return next((part for part in parts if part in self.names), None)


@dataclass(frozen=True)
class _Special:
    """The special tokens of a tokenizer."""

    ids: Mapping[str, int]
    control: _Spelling
    """Those that can be spelled by plain text."""
    ambiguous: _Spelling
    """Those that the tokenizer reads from plain text even if told not to, such as a single letter marked as special."""
    pattern: re.Pattern[str]
    """Matches any added token, the longest first, as the tokenizer does."""


@functools.lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase, size: int) -> _Special:
    """`size` is that of the vocabulary, so that a tokenizer with new tokens is examined again."""
    added = tokenizer.added_tokens_decoder
    named = set(tokenizer.all_special_tokens)
    ids = {t.content: index for index, t in added.items() if t.content and (t.special or t.content in named)}
    clear = [
        name
        for name, index in ids.items()
        if not added[index].special
        or index not in tokenizer.encode(name, add_special_tokens=False, split_special_tokens=True)
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
    """A copy of the tokenizer that recognises each special token only by a stand-in.

    Returns: the copy; special token → its stand-in; id of an added token in the copy → in the tokenizer.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"post_processor": None, "truncation": None, "padding": None}
    stand_ins = {name: f"{_STAND_IN}{index}{_STAND_IN}" for name, index in _special(tokenizer, size).ids.items()}
    for token in described["added_tokens"]:
        token["content"] = stand_ins.get(token["content"], token["content"])
    reader = Tokenizer.from_str(json.dumps(described))
    back = {}
    for index, added in tokenizer.added_tokens_decoder.items():
        there = reader.token_to_id(stand_ins.get(added.content, added.content))
        assert there is not None, f"{added.content!r} is lost in the copy"
        back[there] = index
    return reader, stand_ins, back


def _every_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with each text in it changed, names of columns too, but not roles, which are no text of the data."""
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
    """A control token that `value` spells, and a special token in it that cannot be told from text; None if absent."""
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
    """The ids of `text`, without added tokens. Marked places are encoded as text, all else as the tokenizer does."""
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
    """The ids of a section between special tokens; a tokenizer written in Python encodes each section alone."""
    text = _unmarked(section)
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []


def _unmarked(text: str) -> str:
    return _MARKED.sub(lambda found: chr(int(found[1], 16)), text)
