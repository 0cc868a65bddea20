"""The faults of a data set: all of them, up to a limit, in the order of its rows."""

from __future__ import annotations

from collections import Counter

SHOWN = 20
"""Number of faults that are reported one by one; the others are counted."""


class DataError(ValueError):
    """A data set that cannot be used; one line per fault."""

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
        """Start the next row; later faults belong to it."""
        self._rows += 1

    def reached(self, step: str) -> None:
        """The current row has reached a step of reading in which a setting may be at fault instead of the row."""
        self._reached[step] += 1

    def add(self, line: str, step: str = "", setting: str = "") -> None:
        """Add a fault of the current row.

        `setting`: the config key that may be wrong instead of the row. If every row that reached `step` has the same
        fault, it is reported once.
        """
        self._counts[step, setting] += 1
        kept = self._kept.setdefault((step, setting), [])
        if len(kept) < SHOWN:
            kept.append((self._rows, line))

    def lines(self) -> list[str]:
        """One line per fault, at most SHOWN, and one with the number of others; empty if there are none."""
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
        """Raises: DataError if there is a fault."""
        lines = self.lines()
        if lines:
            raise DataError(lines)
