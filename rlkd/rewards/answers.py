"""Checks the data's answers before a run: no completion could ever be equal to a broken one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rlkd.rewards.math_answer import too_long, unreadable

if TYPE_CHECKING:  # as in `registry`
    from rlkd.config.schema import RewardFunction

READ = 100
"""Number of different answers, spread over the data, that math-verify is tried on. Plain numbers need no check."""
NAMED = 3
"""Number of rows that an error names."""

_NUMBER = re.compile(r"-?(?:\d{1,300}|\d{1,3}(?:,\d{3}){1,9})(?:\.\d{1,300})?")


def check_answers(functions: Sequence[RewardFunction], rows: Iterable[tuple[str, str | None]]) -> list[str]:
    """The answers that the built-in rewards among `functions` cannot use, one line per problem; `rows`: (id, answer).

    Depends on the number and order of rows and not on time, so that all ranks report the same.
    """
    names = {function.name for function in functions}
    without: list[str] = []
    of: dict[str, list[str]] = {}
    for row, answer in rows:
        if answer is None:
            without.append(repr(row[:40]))
        elif "math" in names and _NUMBER.fullmatch(answer.strip()) is None:
            of.setdefault(answer, []).append(row)
    problems = [
        f"reward {name!r} needs an answer, but {_some(without)} none; set data.answer_column"
        for name in ("exact_match", "math")
        if name in names and without
    ]
    wrong = [f"{row[:40]!r} (answer {long[:40]!r} {why})" for long in of if (why := too_long(long)) for row in of[long]]
    texts = [answer for answer in of if too_long(answer) is None]
    step = max(1.0, len(texts) / READ)
    for i in range(min(READ, len(texts))):
        answer = texts[int(i * step)]
        why = unreadable(answer)
        if why is not None:
            wrong += [f"{row[:40]!r} (answer {answer[:40]!r} {why})" for row in of[answer]]
    if wrong:
        problems.append(
            f"reward 'math' cannot use the answers of the data: {_listed(wrong)}; correct them or drop them"
        )
    return problems


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return "; ".join(names[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def _some(rows: Sequence[str]) -> str:
    return f"row {rows[0]} has" if len(rows) == 1 else f"rows {_listed(rows)} have"
