"""Dynamic sampling: which groups of an iteration are trained on, decided as groups become known."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from rlkd.stream import Pause, Stream


class Selection:
    """Draws blocks of groups until enough have a gradient, and tells each group whether it is trained on.

    DAPO, arXiv 2503.14476, Eq. 11. Trained on are the first `share` groups with a gradient, in the order of their
    prompts; where there are too few, the first groups without one fill up. A verdict falls as soon as no other group
    can change it, and a block is drawn as soon as those before it cannot be enough. So both are functions of the
    rewards, and not of the order in which these arrive.
    """

    def __init__(self, stream: Stream, share: int, blocks: int, draw: Callable[[int], int]) -> None:
        """
        Args:
            share: how many groups are trained on.
            blocks: the largest number of blocks that are drawn.
            draw: starts the groups of a block, given its index, and returns their number, at least 1.
        """
        self._stream = stream
        self._share = share
        self._blocks = blocks
        self._draw = draw
        self._drawn = 0
        """Blocks so far."""
        self.has_gradient: list[bool | None] = []
        """By group: whether it has a gradient; None as long as this is not known."""
        self._verdicts: list[Pause[bool]] = []
        self._sampling = 0
        """How many groups have no completions yet."""
        self.all_sampled = asyncio.Event()
        """Whether every group of the iteration has its completions, and no further one will be drawn."""

    def begin(self) -> None:
        """Draw the first block."""
        self._more()

    def sampled(self) -> None:
        """Note that one more group has its completions."""
        self._sampling -= 1
        self._look()

    async def keeps(self, index: int, has_gradient: bool) -> bool:
        """Whether the group `index` is trained on, once this is certain."""
        self.has_gradient[index] = has_gradient
        self._more()
        self._look()
        self._decide()
        return await self._verdicts[index].wait()

    @property
    def no_gradient(self) -> int:
        """How many groups have no gradient."""
        return self.has_gradient.count(False)

    def _more(self) -> None:
        while self._drawn < self._blocks and len(self.has_gradient) - self.no_gradient < self._share:
            started = self._draw(self._drawn)
            self._drawn += 1
            self._sampling += started
            self.has_gradient += [None] * started
            self._verdicts += [Pause(self._stream) for _ in range(started)]

    @property
    def _may_draw(self) -> bool:
        return self._drawn < self._blocks and self.has_gradient.count(True) < self._share

    def _look(self) -> None:
        if self._sampling == 0 and not self._may_draw:
            self.all_sampled.set()

    def _decide(self) -> None:
        """Give the verdicts that are certain: at least, and at most, so many groups come before this one."""
        known, unknown = self.has_gradient.count(True), self.has_gradient.count(None)
        unseen = math.inf if self._may_draw else 0
        before = {True: 0, False: 0, None: 0}
        for has, verdict in zip(self.has_gradient, self._verdicts, strict=True):
            if has is not None:
                least: float
                most: float
                if has:
                    least, most = before[True], before[True] + before[None]
                else:
                    least, most = known + before[False], known + unknown + before[False] + unseen
                if most < self._share or least >= self._share:
                    verdict.end(most < self._share)
            before[has] += 1
