r"""Mathematical answers, compared by math-verify: 1/2 is 0.5 is \frac{1}{2}; the order in a set does not matter.

math-verify reads a text answer as a product of letters ("abc" equals "cba"): for words use exact_match.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

from rlkd.rewards.math_bounds import LONGEST, SECONDS, OutOfTime, TooLarge, check, check_text, processor_time
from rlkd.rewards.math_numbers import apart

_BOX = re.compile(r"\\boxed\s*\{")
_COMPUTED = re.compile(r"binom|Gamma|gamma|gcd|lcm|det|operatorname|\|_|\\choose")


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{…} of `text`, including nested braces; None if there is no box.

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
    """Index of the brace that closes the one before `start`; None if it is never closed."""
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
    # Time is limited by `processor_time` and from outside: math-verify's own limit works by SIGALRM in whole seconds of
    # wall-clock time. It warns about the missing limit once per process.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import parse  # here, since it takes a second

    return list(parse(text, parsing_timeout=None))


def _read(content: str) -> list[Any]:
    """The `content` of a box as math-verify reads it; [] if it cannot.

    Raises: TooLarge before anything is computed.
    """
    check_text(content)
    boxed = _boxed(content)
    if _COMPUTED.search(content):  # math-verify evaluates some functions on reading, so first read without
        from latex2sympy2_extended import latex2sympy
        from math_verify import LatexExtractionConfig
        from sympy import evaluate

        try:
            with evaluate(False):
                unread = latex2sympy(boxed, normalization_config=LatexExtractionConfig().normalization_config)
        except Exception:  # its parser raises bare Exceptions; the other way may still succeed
            unread = None
        check(unread)
    return _parse(boxed)


def _boxed(content: str) -> str:
    """`content` as math-verify reads it best: in one box, on one line, without dollar signs or a full stop."""
    return "\\boxed{" + " ".join(content.split()).strip("$ ").rstrip(". ") + "}"


def _content(answer: str) -> str:
    """The content of the last box of the data's answer, or all of it if it has none."""
    return answer if _BOX.search(answer) is None else last_box(answer) or ""


def too_long(answer: str) -> str | None:
    """The reason why the data's `answer` is too long to be read; None if it is not.

    It would still equal the same text, but no completion has thousands of characters in a box; it may be a whole
    solution.
    """
    length = len(_content(answer))
    return f"has {length} characters, more than {LONGEST}, so it is never read" if length > LONGEST else None


@functools.lru_cache(maxsize=1024)
def unreadable(answer: str) -> str | None:
    """The reason why the data's `answer` cannot be compared with anything; None if it can.

    An answer that is too large to be computed can still be compared with the same text.
    """
    import math_verify  # noqa: F401  before the time limit starts, since it takes a second

    try:
        with processor_time():
            gold = _read(_content(answer))
            for expression in gold:
                check(expression)
            if not gold:
                return "is nothing that math-verify reads as mathematics"
            _equal(gold, gold)
    except TooLarge:
        return None
    except OutOfTime:
        return f"takes more than {SECONDS:g} s to read"
    except Exception as error:  # math-verify and sympy may raise anything
        return f"makes math-verify raise {' '.join(f'{type(error).__name__}: {error}'.split())[:120]}"
    return None


def _equal(gold: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    return any(
        verify(one, other, timeout_seconds=None, raise_on_error=True) and not apart(one, other)
        for one in gold
        for other in found
    )


def math(
    completion: str, *, answer: str | None, prompt: str, meta: Mapping[str, Any], require_box: bool = True
) -> float:
    r"""1.0 if the content of the last \boxed{} equals the answer mathematically, else 0.0.

    Without a box the reward is 0.0, or with `require_box` false that of the answer that math-verify finds in the text.
    A completion is also wrong, 0.0, if it cannot be read, if it is too large to be computed (`math_bounds`) and is not
    the same text as the answer, or if math-verify fails or needs more than SECONDS of processor time. Decimal numbers
    are equal if math-verify finds them equal (rounded to six decimals) and four digits agree.

    Raises: ValueError if there is no answer, or it cannot be read.
    """
    if not isinstance(require_box, bool):
        raise ValueError(f"require_box: expected true or false, got {require_box!r}")
    if answer is None:
        raise ValueError("needs an answer, but the data has none; set data.answer_column")
    wrong = unreadable(answer)
    if wrong is not None:
        raise ValueError(f"the answer {answer[:80]!r} {wrong}; correct it")
    box = last_box(completion)
    if box is None and (require_box or _BOX.search(completion)):
        return 0.0
    expected = _content(answer)
    if box is not None and _boxed(box) == _boxed(expected):
        return 1.0
    try:
        with processor_time():
            gold, found = _read(expected), _parse(completion) if box is None else _read(box)
            for expression in (*gold, *found):
                check(expression)
            return float(_equal(gold, found))
    except (Exception, OutOfTime):  # the answer was checked before, so the completion is the cause
        return 0.0
