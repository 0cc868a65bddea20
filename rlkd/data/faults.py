"""What is wrong with a data set: all of it, up to a bound, in the order of its rows."""

from __future__ import annotations

from collections import Counter

SHOWN = 20
"""Faults of one data set that are said one by one; the others are counted."""


class DataError(ValueError):
    """A data set that cannot be used; one line a fault."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Faults:
    """Collects the faults of one data set while its rows are read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._rows = 0
        self._reached: Counter[str] = Counter()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._kept: dict[tuple[str, str], list[tuple[int, str]]] = {}

    def next_row(self) -> None:
        """Another row begins: what is added from now on is about it."""
        self._rows += 1

    def reached(self, step: str) -> None:
        """The present row has come to a step of reading, in which a setting may be at fault rather than the row."""
        self._reached[step] += 1

    def add(self, line: str, step: str = "", setting: str = "") -> None:
        """One fault of the present row.

        `setting`: the config key that may be wrong instead of the row. If every row that reached `step` has the same
        fault, it is reported once.
        """
        self._counts[step, setting] += 1
        kept = self._kept.setdefault((step, setting), [])
        if len(kept) < SHOWN:
            kept.append((self._rows, line))

    def lines(self) -> list[str]:
        """One line a fault, at most SHOWN, and one that counts the others; empty: there is none."""
        found: list[tuple[int, str]] = []
        total = 0
        for (step, setting), kept in self._kept.items():
            count = self._counts[step, setting]
            once = bool(step) and count == self._reached[step]
            found += kept[:1] if once else kept
            total += 1 if once else count
        shown = [line for _, line in sorted(found, key=lambda fault: fault[0])[:SHOWN]]
        return shown + ([f"{self._path}: and {total - len(shown)} more"] if total > len(shown) else [])

    def check(self) -> None:
        """Raises: DataError, where there is a fault."""
        lines = self.lines()
        if lines:
            raise DataError(lines)
