"""Which prompts an iteration uses: a pure function of the seed, so that a resumed run needs no stored order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlkd.types import Prompt


class PromptSource(Protocol):
    """A sized, indexable collection of prompts; a list of them will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Prompt: ...


class Stream(Protocol):
    """Endless prompts, drawn by iteration."""

    def take(
        self, iteration: int, count: int, rank: int = 0, world: int = 1, *, block: int = 0, blocks: int = 1
    ) -> list[Prompt]:
        """See `PromptStream.take`."""
        ...


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


class MixedStream:
    """Endless prompts from several sources, of which each has the same share in every iteration.

    Each source is a `PromptStream` with epochs of its own. The shares are rounded to whole prompts; of the sources
    with equal remainders, the first ones get one more.
    """

    def __init__(
        self, sources: Sequence[PromptSource], shares: Sequence[float], names: Sequence[str], seed: int
    ) -> None:
        """`shares` are positive and add up to 1; `names` are for messages."""
        self._streams = [PromptStream(source, seed) for source in sources]
        self._shares = tuple(shares)
        self._names = tuple(names)
        self._seed = seed

    def counts(self, count: int) -> list[int]:
        """How many of `count` prompts each source gives."""
        exact = [share * count for share in self._shares]
        found = [int(part + 1e-9) for part in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])  # stable
        for i in by_remainder[: count - sum(found)]:
            found[i] += 1
        return found

    def take(
        self, iteration: int, count: int, rank: int = 0, world: int = 1, *, block: int = 0, blocks: int = 1
    ) -> list[Prompt]:
        """See `PromptStream.take`. The sources' prompts are shuffled before they are shared among the ranks."""
        if count % world:
            raise ValueError(f"rollout.prompts is {count}, not divisible by the {world} ranks; choose a multiple")
        prompts: list[Prompt] = []
        for stream, part, name in zip(self._streams, self.counts(count), self._names, strict=True):
            try:
                prompts += stream.take(iteration, part, block=block, blocks=blocks) if part else []
            except ValueError as error:
                raise ValueError(f"data.mix: the part of {name}: {error}") from error
        order = _permutation.__wrapped__(self._seed, 2**32 + iteration * blocks + block, count)  # used once
        share = count // world
        return [prompts[int(i)] for i in order[rank * share : (rank + 1) * share]]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """A permutation of range(size) by (seed, epoch).

    From the raw bits of Philox, whose stream numpy keeps for ever; `Generator.permutation` may change with a release.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(keys, kind="stable")
