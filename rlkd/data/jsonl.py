"""One JSON object per line, read strictly: anything that another reader might read differently is refused.

Python's own `json` turns large numbers into infinity, keeps the last of two equal names, accepts NaN and half of a
surrogate pair, and exhausts its stack on deep nesting. Here such a line is an error that names the place and the
reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100
"""Nested lists and objects. Python's reader manages a few hundred, fewer if it is called from a deep stack."""

_MEND = "correct or remove the line"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u([0-9a-fA-F]{4})|.)")
"""One escape, or the two of a pair; group 1: the code of a lone one. A backslash that is meant is itself escaped."""
_SHOWN = 20


def read_jsonl(path: str) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """(`file:line`, object) of every line that is not blank, or why it is not one JSON object.

    The file may start with a byte order mark. Raises: ValueError, one line, if the file cannot be read.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield f"{path}:{number}", _parsed(line)
    except OSError as error:
        hint = (
            "; to read the files in a folder, name it without .jsonl at its end"
            if isinstance(error, IsADirectoryError)
            else ""
        )
        raise ValueError(f"{path}: cannot be read: {error.strerror}{hint}") from error


def _parsed(line: bytes) -> dict[str, Any] | ValueError:
    try:
        return parse(line)
    except ValueError as error:
        return error


def parse(line: bytes) -> dict[str, Any]:
    """The object in a line.

    Raises: ValueError with the column (from 1), what was expected and what was found there.
    """
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        what = f"got {line[error.start : error.start + 4]!r} ({error.reason})"
        raise ValueError(f"byte {error.start + 1}: not UTF-8: {what}; save the file as UTF-8") from error
    try:
        value = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, parse_int=_integer, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"column {error.colno}: expected one JSON object per line, got no JSON ({_reason(error)}); {_MEND}"
        ) from error
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    if not isinstance(value, dict):
        what = {"list": "a JSON list", "str": "a JSON text", "NoneType": "null"}.get(
            type(value).__name__, f"the JSON value {text.strip()[:_SHOWN]}"
        )
        raise ValueError(f'column 1: expected one object with columns, such as {{"prompt": …}}, got {what}; {_MEND}')
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(_too_deep())
    half = _half_of_a_pair(text)
    if half is not None:
        raise ValueError(
            f"column {half + 1}: got {text[half : half + 6]}, half of a surrogate pair, which is no character; {_MEND}"
        )
    return value


def _reason(error: json.JSONDecodeError) -> str:
    rest = error.doc[error.pos : error.pos + _SHOWN].rstrip()
    if rest.startswith("\ufeff"):
        return "got a byte order mark, which may be only at the start of a file"
    reason = "a second value" if error.msg == "Extra data" else error.msg.removesuffix(" at")
    reason = f"{reason[0].lower()}{reason[1:]}"
    return f"{reason}, got {rest!r}" if rest else f"{reason}, got the end of the line"


def _too_deep() -> str:
    return f"more than {MAX_DEPTH} nested lists and objects; flatten or remove the column"


def _no_number(word: str) -> Any:
    raise ValueError(f"got {word}, which is no JSON number; write null, or leave the row out")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"got {text[:_SHOWN]}, which is beyond a 64-bit float; write it as a text")
    return number


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"got an integer of {len(text)} digits; write it as a text") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} is used twice in one object; keep one")
    return found


def _depth(value: Any) -> int:
    """Level by level, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return depth


def _half_of_a_pair(text: str) -> int | None:
    """Where the first escape of half a surrogate pair begins in a valid JSON text; None: nowhere."""
    if _SURROGATE.search(text) is None:
        return None
    for found in _ESCAPE.finditer(text):
        if found[1] is not None and 0xD800 <= int(found[1], 16) <= 0xDFFF:
            return found.start()
    return None
