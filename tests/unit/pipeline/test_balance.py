"""The assignment of groups to ranks: what must hold for any sizes, and what it gains on lengths like those of a run."""

import random
from statistics import fmean

import numpy as np
import pytest
from builders import scored

from rlkd.pipeline.balance import ENOUGH, LEAST, assign, size


def drawn(seed, ranks=None, rows=(1, 2, 4)):
    """The sizes of groups on some ranks: as many on each, of different numbers of rows, and with a few very long."""
    chance = random.Random(seed)
    ranks, groups = ranks or chance.randint(1, 9), chance.randint(1, 12)
    return [
        [(chance.choice(rows), int(chance.lognormvariate(7, chance.choice((0.1, 0.8, 2)))) + 1) for _ in range(groups)]
        for _ in range(ranks)
    ]


def loads(sizes, places):
    return [sum(sizes[rank][index][1] for rank, index in taken) for taken in places]


def as_sampled(sizes):
    return [[(rank, index) for index in range(len(held))] for rank, held in enumerate(sizes)]


@pytest.mark.parametrize("seed", range(200))
def test_every_group_is_trained_once_and_no_rank_has_other_numbers_of_groups_or_rows(seed):
    sizes = drawn(seed)
    places = assign(sizes)
    assert sorted(place for taken in places for place in taken) == [
        place for held in as_sampled(sizes) for place in held
    ]
    for taken, held in zip(places, sizes, strict=True):
        assert [sizes[rank][index][0] for rank, index in taken] == [rows for rows, _ in held]


@pytest.mark.parametrize("seed", range(200))
def test_the_heaviest_rank_never_gets_heavier_and_every_move_is_for_something(seed):
    sizes = drawn(seed)
    places = assign(sizes)
    before, after = loads(sizes, as_sampled(sizes)), loads(sizes, places)
    mean = fmean(before)
    assert max(after) <= max(before)
    if places != as_sampled(sizes):
        assert max(before) > (1 + ENOUGH) * mean
        assert sorted(after, reverse=True) < sorted(before, reverse=True), "the heaviest, or fewer that are as heavy"


@pytest.mark.parametrize("seed", range(100))
def test_it_ends_only_where_no_swap_of_the_heaviest_rank_helps(seed):
    sizes = drawn(seed)
    places = assign(sizes)
    after = loads(sizes, places)
    mean, heavy = fmean(after), after.index(max(after))
    if after[heavy] <= (1 + ENOUGH) * mean:
        return
    for other in set(range(len(sizes))) - {heavy}:
        for a in places[heavy]:
            for b in places[other]:
                (rows, tokens), (its_rows, its_tokens) = sizes[a[0]][a[1]], sizes[b[0]][b[1]]
                left = max(after[heavy] - tokens + its_tokens, after[other] + tokens - its_tokens)
                assert rows != its_rows or left > after[heavy] - LEAST * mean


@pytest.mark.parametrize("seed", range(50))
def test_the_order_of_the_ranks_does_not_matter(seed):
    sizes = drawn(seed, ranks=5)
    order = random.Random(seed).sample(range(5), 5)
    places, again = assign(sizes), assign([sizes[rank] for rank in order])
    assert again == [[(order.index(rank), index) for rank, index in places[was]] for was in order]
    assert assign(sizes) == places


def test_a_swap_by_hand():
    """60 and 20 tokens: 30 for 10 makes both 40. Groups of other rows stay, even where they would fit better."""
    assert assign([[(1, 30), (1, 30)], [(1, 10), (1, 10)]]) == [[(1, 0), (0, 1)], [(0, 0), (1, 1)]]
    assert assign([[(2, 30), (1, 30)], [(1, 10), (1, 10)]]) == [[(0, 0), (1, 0)], [(0, 1), (1, 1)]]
    assert assign([[(2, 30), (2, 30)], [(1, 10), (1, 10)]]) == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
    assert assign([[(1, 1000)], [(1, 990)]]) == [[(0, 0)], [(1, 0)]]


def test_the_size_of_a_group_has_its_prompt_once_where_it_is_computed_once():
    first = scored(0, 5, 1.0)
    prompt = first.rollout.prompt
    group = [first, scored(1, 7, 0.0, rollout=scored(0, 7, 0.0).rollout)]
    assert [s.rollout.prompt for s in group] == [prompt, prompt] and len(prompt.token_ids) == 3
    assert size(group, share_prompts=False) == (2, 3 + 5 + 3 + 7)
    assert size(group, share_prompts=True) == (2, 3 + 5 + 7)


@pytest.mark.parametrize("ranks", [8, 64])
def test_what_it_gains(ranks):
    """16 groups a rank of 8 completions: log-normal lengths, median 700, σ 0.8, at most 4,096. `-s` prints it."""
    chance, before, after, moved = np.random.default_rng(0), [], [], []
    for _ in range(20):
        lengths = np.minimum(4096, np.exp(np.log(700) + 0.8 * chance.standard_normal((ranks, 16, 8)))).astype(int)
        sizes = [[(8, int(tokens)) for tokens in of] for of in lengths.sum(-1)]
        places = assign(sizes)
        for found, where in ((before, as_sampled(sizes)), (after, places)):
            found.append(max(loads(sizes, where)) / fmean(loads(sizes, where)))
        moved.append(sum(rank != to for to, taken in enumerate(places) for rank, _ in taken) / (16 * ranks))
    print(
        f"\n{ranks} ranks: heaviest / mean {fmean(before):.3f} → {fmean(after):.3f} (at most {max(after):.3f}), "
        f"{fmean(moved):.1%} of the groups moved"
    )
    assert fmean(before) > 1.08 and max(after) < 1 + ENOUGH and fmean(moved) < 0.15
