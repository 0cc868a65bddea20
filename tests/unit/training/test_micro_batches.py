"""How sequences are divided into micro-batches."""

import itertools

import numpy as np
import pytest

from rlkd.training.micro_batches import split_by_tokens

OVERHEAD = 1024


def cost(parts, lengths):
    return sum(len(part) * max(lengths[i] for i in part) + OVERHEAD for part in parts)


def divisions(order, budget, lengths):
    """All divisions of the sorted sequences within the budget."""
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        parts = [[order[0]]]
        for row, cut in zip(order[1:], cuts, strict=True):
            if cut:
                parts.append([row])
            else:
                parts[-1].append(row)
        if all(len(part) * lengths[part[0]] <= budget for part in parts):
            yield parts


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_cheapest_division(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(10, 2500, 9).tolist()
    order = sorted(range(9), key=lambda i: (-lengths[i], i))
    for budget in (2500, 4000, 100_000):
        found = split_by_tokens(lengths, budget, OVERHEAD)
        assert sorted(itertools.chain(*found)) == list(range(9))
        assert all(len(part) * lengths[part[0]] <= budget for part in found)
        assert cost(found, lengths) == min(cost(parts, lengths) for parts in divisions(order, budget, lengths))
        tokens = [len(part) * lengths[part[0]] for part in found]
        assert tokens == sorted(tokens, reverse=True), "ranks wait least if the n-th of all have about the same size"


def test_a_sequence_beyond_the_budget_is_an_error():
    with pytest.raises(ValueError, match=r"trainer.micro_batch_tokens: expected at least 30, .*, got 29"):
        split_by_tokens([5, 30], 29, OVERHEAD)


def test_many_sequences_take_a_moment():
    lengths = np.random.default_rng(0).integers(10, 4000, 4000).tolist()
    assert sum(len(part) for part in split_by_tokens(lengths, 16384, OVERHEAD)) == 4000
