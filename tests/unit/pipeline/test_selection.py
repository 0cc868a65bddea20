"""Which groups dynamic sampling trains on, against the rule written as a loop over whole blocks."""

import asyncio
import itertools
import random

import pytest

from rlkd.pipeline.selection import Selection
from rlkd.stream import Stream

SHARE, BLOCKS = 3, 3


def in_blocks(gradients):
    """(groups drawn, indices trained on): draw whole blocks until enough have a gradient, then fill up."""
    drawn = 0
    for _ in range(BLOCKS):
        drawn += SHARE
        if sum(gradients[:drawn]) >= SHARE:
            break
    chosen = sorted(range(drawn), key=lambda i: not gradients[i])[:SHARE]
    return drawn, sorted(chosen)


def streamed(gradients, order, blocks=BLOCKS):
    """The same by a Selection to which the groups become known in the order of the numbers `order`."""
    stream = Stream(together=True, ahead=True)
    kept, drawn, tasks = [], [0], []

    async def one(selection, index):
        await asyncio.sleep(order[index] * 0.0005)
        if await selection.keeps(index, gradients[index]):
            kept.append(index)

    async def walk():
        def draw(block):
            first = drawn[0]
            drawn[0] += SHARE
            for index in range(first, first + SHARE):
                tasks.append(stream.start(group, (index,), one(selection, index)))
            return SHARE

        selection = Selection(stream, SHARE, blocks, draw)
        async with asyncio.TaskGroup() as group:
            selection.begin()

    stream.submit(walk()).result(10)
    assert stream._open == 0
    stream.close()
    return drawn[0], sorted(kept)


def test_it_is_the_rule_by_blocks_whatever_the_order_of_arrival():
    draw = random.Random(1)
    patterns = [p for p in itertools.product((False, True), repeat=SHARE * BLOCKS) if draw.random() < 0.15]
    assert len(patterns) > 50
    for gradients in patterns:
        order = draw.sample(range(SHARE * BLOCKS), SHARE * BLOCKS)
        assert streamed(gradients, order) == in_blocks(gradients), (gradients, order)


@pytest.mark.parametrize("gradients", [(True, True, True), (False, False, True), (False,) * 3])
def test_with_one_block_nobody_waits(gradients):
    """Every group is trained on, so none waits for the rewards of another."""
    stream, kept = Stream(together=True, ahead=True), []

    async def walk():
        selection = Selection(stream, SHARE, 1, lambda block: SHARE)
        selection.begin()
        for index in (2, 0, 1):  # in a row: each gets its verdict before the next one is known
            kept.append(await asyncio.wait_for(selection.keeps(index, gradients[index]), 1))

    stream.submit(walk()).result(10)
    stream.close()
    assert kept == [True] * 3


def test_a_block_is_drawn_as_soon_as_the_first_cannot_be_enough():
    stream, blocks = Stream(together=True, ahead=True), []

    async def walk():
        selection = Selection(stream, SHARE, BLOCKS, lambda block: blocks.append(block) or SHARE)
        selection.begin()
        waiting = asyncio.ensure_future(selection.keeps(1, False))
        await asyncio.sleep(0)
        waiting.cancel()

    stream.submit(walk()).result(10)
    stream.close()
    assert blocks == [0, 1], "although two groups of the first block are not known"
