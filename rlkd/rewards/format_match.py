"""Compares the completion with a regular expression."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def format(completion: str, *, answer: str | None, prompt: str, meta: Mapping[str, Any], pattern: str) -> float:
    """1.0 if the whole completion matches the regular expression `pattern` (`.` matches a line end too), else 0.0.

    Example: format("<think>a</think>b", pattern="<think>.*</think>.*", answer=None, prompt="", meta={}) is 1.0.
    """
    return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)
