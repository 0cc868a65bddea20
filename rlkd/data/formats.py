"""Data in the form in which a benchmark is published, by a name before the path: `gsm8k:FILE`, `math-500:FILE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Columns = Mapping[str, Any]

_FINAL = "final_answer"
"""A column that is not in the files of GSM8K."""


def _as_published(columns: Columns) -> Columns:
    return columns


def _gsm8k(columns: Columns) -> Columns:
    """The row with the number after the last `####` of its answer, without thousands separators, as `final_answer`.

    Raises: ValueError, one line, if the answer has none.
    """
    solution = columns.get("answer")
    _, mark, final = solution.rpartition("####") if isinstance(solution, str) else ("", "", "")
    if not mark or not final.strip():
        raise ValueError(
            "expected a column 'answer' with a solution and '#### ' before its number, as in GSM8K, got "
            f"{str(solution)[-40:]!r}; correct the row, or name the columns without gsm8k:"
        )
    return {**columns, _FINAL: final.strip().replace(",", "")}


@dataclass(frozen=True)
class Format:
    """How the rows of a benchmark are read."""

    columns: Mapping[str, str | None]
    """Keys of the section `data` that the format decides."""
    read: Callable[[Columns], Columns] = _as_published


FORMATS: Mapping[str, Format] = {
    "gsm8k": Format(
        {"prompt_column": "question", "answer_column": _FINAL, "id_column": None, "tools_column": None}, _gsm8k
    ),
    "math-500": Format(
        {"prompt_column": "problem", "answer_column": "answer", "id_column": "unique_id", "tools_column": None}
    ),
}
"""GSM8K (arXiv 2110.14168) has `question` and `answer`; MATH-500, of MATH (arXiv 2103.03874), has `problem`, `answer`,
`solution`, `subject`, `level` and `unique_id`."""


def named(path: str) -> tuple[Format | None, str]:
    """(the format before the colon, the path after it), or (None, `path`) if no format is named."""
    name, colon, rest = path.partition(":")
    return (FORMATS[name], rest) if colon and name in FORMATS else (None, path)
