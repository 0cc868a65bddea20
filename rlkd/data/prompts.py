"""Which prompts an iteration uses: a pure function of the seed, so that a resumed run needs no stored order."""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlkd.types import Prompt


class PromptSource(Protocol):
    """A sized, indexable collection of prompts; a list of them will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Prompt: ...


class PromptStream:
    """Endless prompts in a shuffled order.

    An epoch is a permutation of the source, drawn anew from (seed, epoch) and cut into floor(N / count) whole
    iterations; the few that are left over wait for a later epoch. So no prompt appears twice in an iteration.
    """

    def __init__(self, source: PromptSource, seed: int) -> None:
        """`seed`: 0 ≤ seed < 2**64."""
        self._source = source
        self._seed = seed

    def take(
        self, iteration: int, count: int, rank: int = 0, world: int = 1, *, block: int = 0, blocks: int = 1
    ) -> list[Prompt]:
        """Rank `rank`'s share, count / world prompts, of the `count` prompts of an iteration (0 is the first).

        An iteration that may want more owns `blocks` times `count` prompts, all different; this is block `block`.

        Raises: ValueError where the source has fewer prompts than an iteration owns, or `world` does not divide
        `count`.
        """
        size = len(self._source)
        if count * blocks > size:
            times = f" and algorithm.resample_rounds is {blocks}" if blocks > 1 else ""
            raise ValueError(
                f"rollout.prompts is {count}{times}, but the data has only {size} prompts; lower it or use more data"
            )
        if count % world:
            raise ValueError(f"rollout.prompts is {count}, not divisible by the {world} ranks; choose a multiple")
        epoch, position = divmod(iteration, size // (count * blocks))
        share = count // world
        start = (position * blocks + block) * count + rank * share
        return [self._source[int(i)] for i in _permutation(self._seed, epoch, size)[start : start + share]]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """A permutation of range(size) by (seed, epoch).

    From the raw bits of Philox, whose stream numpy keeps for ever; `Generator.permutation` may change with a release.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(keys, kind="stable")
