"""Compares the completion with the answer, letter by letter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exact_match(
    completion: str, *, answer: str | None, prompt: str, meta: Mapping[str, Any], after: str | None = None
) -> float:
    """1.0 if completion and answer are equal, apart from white space around them, else 0.0.

    Args:
        after: judge only the text after its last occurrence, or the whole completion if it does not occur.

    Example: exact_match(" cba\\n", answer="cba", prompt="reverse: abc", meta={}) is 1.0, and so is
    exact_match("cbb, no: cba", answer="cba", prompt="reverse: abc", meta={}, after="no: ").
    Raises: ValueError without an answer, or with an empty `after`.
    """
    if answer is None:
        raise ValueError("needs an answer, but the data has none; set data.answer_column")
    if after == "":
        raise ValueError("option after is empty; give the text that precedes the answer, or null")
    return float(judged(completion, after).strip() == answer.strip())


def judged(completion: str, after: str | None) -> str:
    """The part of `completion` that is compared with the answer."""
    return completion if after is None else completion.rsplit(after, 1)[-1]
