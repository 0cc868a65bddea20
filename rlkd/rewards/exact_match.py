"""The completion is the answer, letter by letter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exact_match(completion: str, *, answer: str | None, prompt: str, meta: Mapping[str, Any]) -> float:
    """1.0 where completion and answer are equal but for white space around them, else 0.0.

    Example: exact_match(" cba\\n", answer="cba", prompt="reverse: abc", meta={}) is 1.0.
    Raises: ValueError without an answer.
    """
    if answer is None:
        raise ValueError("needs an answer, but the data has none; set data.answer_column")
    return float(completion.strip() == answer.strip())
