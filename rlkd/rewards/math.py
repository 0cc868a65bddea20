r"""Mathematical answers, compared by math-verify: 1/2 is 0.5 is \frac{1}{2}; the order in a set does not matter.

math-verify reads a text answer as a product of letters ("abc" equals "cba"): for words use exact_match.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

_BOX = re.compile(r"\\boxed\s*\{")


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{…} of `text`, nested braces included; None without one.

    A box that is never closed counts as the last one and has no content: a completion that was cut off in the middle
    of its answer has not answered, whatever it had boxed before. Of nested boxes the outer one counts. An escaped
    brace, as in \{1, 2\}, does not count as a brace.
    """
    content: str | None = None
    position = 0
    while (match := _BOX.search(text, position)) is not None:
        end = _closing_brace(text, match.end())
        content = None if end is None else text[match.end() : end]
        position = match.end() if end is None else end
    return content


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`; None where there is none."""
    depth = 1
    i = start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # the next character is escaped
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return None


def _parse(text: str) -> list[Any]:
    # Time is limited from outside, by killing the process: math-verify's own limit works by SIGALRM, which only a main
    # thread may use and which does not interrupt a long C call. It warns about the missing limit once per process.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import parse  # takes a second, so only who needs it pays

    return list(parse(text, parsing_timeout=None))


def _boxed(content: str) -> str:
    """`content` as math-verify reads it best: in one box, on one line, without dollar signs or a full stop."""
    return "\\boxed{" + " ".join(content.split()).strip("$ ").rstrip(". ") + "}"


def math(
    completion: str, *, answer: str | None, prompt: str, meta: Mapping[str, Any], require_box: bool = True
) -> float:
    r"""1.0 where the content of the last \boxed{} equals the answer as mathematics, else 0.0.

    Without a box: 0.0, or with `require_box` false whatever math-verify finds in the text. What it cannot read is
    wrong: 0.0.

    Raises: ValueError without an answer, or where the answer cannot be read; whatever a comparison raises.
    """
    if not isinstance(require_box, bool):
        raise ValueError(f"require_box is {require_box!r}, wants true or false")
    if answer is None:
        raise ValueError("needs an answer, but the data has none; set data.answer_column")
    box = last_box(completion)
    if box is None and (require_box or _BOX.search(completion)):
        return 0.0
    gold = _parse(_boxed(answer if _BOX.search(answer) is None else last_box(answer) or ""))
    if not gold:
        raise ValueError(f"cannot read the answer {answer!r} as mathematics")
    found = _parse(completion if box is None else _boxed(box))

    from math_verify import verify

    return float(verify(gold, found, timeout_seconds=None, raise_on_error=True))
