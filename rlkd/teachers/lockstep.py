"""Lets all ranks run each forward of a sharded frozen model together, although each scores when it has something to.

Ranks score different numbers of batches at different times, but a forward of a sharded model gathers its weights from
all of them. So they meet in turns: in each, every rank has some forwards of one model to do, or none. All of them learn
the largest number for each model, and who has fewer adds forwards of one token, whose results nothing uses. What a
forward with results computes does not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlkd import distributed


class Lockstep:
    """The sharded frozen models of a run. Every rank adds them in the same order."""

    def __init__(self) -> None:
        self._fillers: list[Callable[[], None]] = []

    def add(self, filler: Callable[[], None]) -> int:
        """The number of a model, of which `filler` runs a forward without results."""
        self._fillers.append(filler)
        return len(self._fillers) - 1

    def turn(self, busy: bool, model: int | None = None, forwards: Sequence[Callable[[], None]] = ()) -> bool:
        """Run `forwards` of a model, and what it takes to run those of other ranks. A collective.

        Args:
            busy: whether this rank will take part in another turn even if no other rank is busy.

        Returns: whether any rank is busy, and so whether all take part in another turn.
        """
        wanted = [float(len(forwards)) if number == model else 0.0 for number in range(len(self._fillers))]
        *most, anyone = distributed.all_reduce([*wanted, float(busy)], "max")
        for number, (count, filler) in enumerate(zip(most, self._fillers, strict=True)):
            own = forwards if number == model else ()
            for index in range(int(count)):
                (own[index] if index < len(own) else filler)()
        return anyone > 0.0
