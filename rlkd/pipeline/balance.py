"""Which groups each rank trains: about as many tokens on every rank, since all wait for the one with the most.

A rank samples its own groups. Before they become a Batch, the heaviest rank swaps a group for a shorter one of a
lighter rank, again and again. A swap leaves the number of groups and rows of each rank as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlkd import distributed
from rlkd.metrics import MetricAccumulator
from rlkd.pipeline.line import Group

Size = tuple[int, int]
"""Of a group: (rows, tokens that the trainer computes)."""

Place = tuple[int, int]
"""Where a group was sampled: (rank, index among the groups of that rank)."""

ENOUGH = 0.01
"""By how much of the mean the heaviest rank may exceed it: there is not more to be gained then."""

LEAST = 0.001
"""How much of the mean a swap must take off the heaviest rank to be worth sending two groups."""


def balanced(groups: list[Group], share_prompts: bool, metrics: MetricAccumulator) -> list[Group]:
    """The groups that this rank trains, in exchange for `groups`, which it sampled. A collective, if there are others.

    Adds `balance/tokens` to `metrics`. The result is a function of the groups of all ranks.

    Args:
        share_prompts: whether the prompt of a group is computed once for all its completions.
    """
    if distributed.world_size() == 1:
        return groups
    own = distributed.rank()
    sizes: list[list[Size]] = distributed.gather([size(group, share_prompts) for group in groups])
    places = assign(sizes)
    loads = [sum(sizes[rank][index][1] for rank, index in taken) for taken in places]
    metrics.maximum("balance/tokens", max(loads) * len(loads) / sum(loads))
    if all(rank == to for to, taken in enumerate(places) for rank, _ in taken):
        return groups
    leaving = {to: [groups[i] for rank, i in taken if rank == own] for to, taken in enumerate(places) if to != own}
    coming = distributed.exchange({to: parts for to, parts in leaving.items() if parts})
    arrived = {rank: iter(parts) for rank, parts in coming.items()}
    return [groups[index] if rank == own else next(arrived[rank]) for rank, index in places[own]]


def size(group: Group, share_prompts: bool) -> Size:
    """The rows and tokens of a group."""
    prompts = [scored.rollout.prompt.token_ids for scored in group]
    read = set(prompts) if share_prompts else prompts
    return len(group), sum(map(len, read)) + sum(len(scored.rollout.token_ids) for scored in group)


def assign(sizes: Sequence[Sequence[Size]]) -> list[list[Place]]:
    """By rank: where the groups that it trains were sampled.

    Swaps of the heaviest rank, each with the lightest one that can relieve it, and with the pair of groups, equal in
    rows, that leaves the lowest maximum of the two ranks. It ends when the heaviest exceeds the mean by less than
    ENOUGH, or no swap takes LEAST off it. Of equal choices it takes the first, so every rank finds the same.

    Args:
        sizes: those of the groups that each rank sampled.
    """
    places = [[(rank, index) for index in range(len(held))] for rank, held in enumerate(sizes)]
    rows, tokens = ([np.array([each[part] for each in held], dtype=np.int64) for held in sizes] for part in (0, 1))
    loads = [int(held.sum()) for held in tokens]
    mean = sum(loads) / len(loads)
    while max(loads) > (1 + ENOUGH) * mean:
        heavy = loads.index(max(loads))
        for light in sorted(range(len(loads)), key=lambda rank: (loads[rank], rank)):
            surplus = tokens[heavy][:, None] - tokens[light]
            higher = np.maximum(loads[heavy] - surplus, loads[light] + surplus)
            higher[rows[heavy][:, None] != rows[light]] = loads[heavy]
            give, take = np.unravel_index(higher.argmin(), higher.shape)
            if higher[give, take] <= loads[heavy] - LEAST * mean:
                break
        else:
            return places
        loads[heavy] -= int(surplus[give, take])
        loads[light] += int(surplus[give, take])
        for held in (tokens, places):
            held[heavy][give], held[light][take] = held[light][take], held[heavy][give]
    return places
