"""Which rows of the data are trained on, and which are held out: `eval.fraction`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from rlkd.data.rows import Row


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the two parts of a data set.

    Where a prompt belongs is a function of the seed and its text alone. So equal prompts are in the same part, a prompt
    stays in its part when rows are added, and runs with different `run.seed` hold out the same prompts.
    """

    fraction: float
    """Of all prompts that are held out, on average."""
    seed: int
    held_out: bool
    """Whether this is the held-out part."""

    def place(self, row: Row) -> float:
        """A number in [0, 1) that the seed draws for the text of the prompt."""
        text = json.dumps([self.seed, row.prompt], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64

    def has(self, row: Row) -> bool:
        """Whether the row is in this part."""
        return (self.place(row) < self.fraction) == self.held_out
