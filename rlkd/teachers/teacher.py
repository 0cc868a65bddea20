"""The protocol that every teacher keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlkd.types import TeacherScores


class Teacher(Protocol):
    """Scores token ids that somebody else wrote. Frozen; never a submodule of the student."""

    def start(self) -> None:
        """Begin what takes long, such as starting a server, without waiting. Every rank calls it, before `open`."""
        ...

    def open(self) -> None:
        """Load the model or connect to the server. Every rank calls it, after the process group exists."""
        ...

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[TeacherScores]:
        """For each (prompt ids, completion ids), the log-prob of every completion token given all before it."""
        ...

    def close(self) -> None:
        """Free what `open` took."""
        ...
