"""Where the time of an iteration's left half goes, although its groups are in different stages at the same time."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("rollout", "reward", "teacher")
"""In the order of the line."""


class StageClock:
    """Counts the groups that are in each stage. A moment belongs to the earliest stage that has a group."""

    def __init__(self) -> None:
        self._inside: Counter[str] = Counter()
        self._times: list[float] = []
        self._stages: list[str | None] = []
        """From the time of equal index on, time belongs to this stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around what one group does in the stage `name`, one of STAGES."""
        self._change(name, 1)
        try:
            yield
        finally:
            self._change(name, -1)

    def _change(self, name: str, by: int) -> None:
        self._inside[name] += by
        now = next((stage for stage in STAGES if self._inside[stage]), None)
        if not self._stages or now != self._stages[-1]:
            self._times.append(time.perf_counter())
            self._stages.append(now)

    def seconds(self, start: float, end: float) -> dict[str, float]:
        """Seconds of each stage between two times of `time.perf_counter`."""
        found = dict.fromkeys(STAGES, 0.0)
        first = max(0, bisect.bisect_right(self._times, start) - 1)
        for i in range(first, len(self._times)):
            begins, stage = max(start, self._times[i]), self._stages[i]
            ends = min(end, self._times[i + 1]) if i + 1 < len(self._times) else end
            if stage is not None and ends > begins:
                found[stage] += ends - begins
        return found
