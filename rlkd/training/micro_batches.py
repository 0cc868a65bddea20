"""Splits one rank's rollouts into updates, and each update into micro-batches with a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from rlkd.types import Batch

OVERHEAD = {"cpu": 256, "cuda": 1024}
"""On a GPU, and on any other device: what a further micro-batch costs, in tokens: its calls, and gathering a
sharded model's parameters. The one of the CPU was measured with 1M and 10M parameters, that of CUDA is an estimate."""


def updates(batch: Batch, count: int, seed: int) -> Iterator[Batch]:
    """`count` equal parts of the batch, rows shuffled by (seed, iteration); the batch itself for 1.

    Raises: ValueError if `count` does not divide the number of rows.
    """
    rows = len(batch)
    if rows % count:
        raise ValueError(
            f"trainer.updates_per_iteration: expected a divisor of the {rows} rollouts of a rank, got {count}"
        )
    if count == 1:
        yield batch
        return
    order = np.random.Generator(np.random.Philox(key=[seed, batch.iteration])).permutation(rows)
    for part in np.split(order, count):
        yield batch.rows(torch.as_tensor(part, device=batch.input_ids.device))


def split_by_tokens(lengths: list[int], budget: int, overhead: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, with sequences × longest ≤ budget tokens; in each, longest first.

    The micro-batches with the most tokens come first: ranks wait for each other in every one, so those of one size
    should meet. Sequences of similar length go together. Of all divisions of the sorted sequences it is the one with
    the fewest tokens, padding included, where a further micro-batch counts as `overhead` tokens.

    Raises: ValueError if one sequence exceeds the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if lengths[order[0]] > budget:
        raise ValueError(
            f"trainer.micro_batch_tokens: expected at least {lengths[order[0]]}, the tokens of a rollout, got "
            f"{budget}; raise it"
        )
    longest = np.array([lengths[i] for i in order])
    costs = np.zeros(len(order) + 1)
    """By number of sequences: the tokens of the best division of so many, the longest ones."""
    starts = np.zeros(len(order) + 1, dtype=np.int64)
    """Where the last micro-batch of that division begins."""
    for end in range(1, len(order) + 1):
        tokens = np.arange(end, 0, -1) * longest[:end]  # of the last one, by where it begins
        total = np.where(tokens <= budget, costs[:end] + tokens + overhead, np.inf)
        starts[end] = total.argmin()
        costs[end] = total[starts[end]]
    parts, end = [], len(order)
    while end > 0:
        parts.append(order[starts[end] : end])
        end = int(starts[end])
    return sorted(parts, key=lambda part: (-len(part) * lengths[part[0]], part))


def micro_batches(batch: Batch, budget: int, width: int | None) -> list[tuple[torch.Tensor, Batch]]:
    """(the rows' indices, the micro-batch), for micro-batches of at most `budget` tokens, padding included.

    Args:
        width: None: each row is a sequence. Otherwise rows with the same prompt are computed as few sequences, and this
            is the model's hidden size, which decides how long they should be.

    Raises: ValueError if one row exceeds the budget.
    """
    overhead = OVERHEAD["cuda" if batch.input_ids.is_cuda else "cpu"]
    lengths: list[int] = batch.lengths.tolist()
    if width is None:
        parts = split_by_tokens(lengths, budget, overhead)
        indices = [torch.tensor(part, device=batch.input_ids.device) for part in parts]
        return [(index, batch.rows(index, lengths[part[0]])) for index, part in zip(indices, parts, strict=True)]
    sequences = [rows for group in _groups(batch) for rows in _joined(batch, group, budget, width)]
    prompts = batch.prompt_lengths.tolist()
    tokens = [prompts[rows[0]] + sum(lengths[row] - prompts[row] for row in rows) for rows in sequences]
    found = []
    for part in split_by_tokens(tokens, budget, overhead):
        index = [row for i in part for row in sequences[i]]
        ends = np.cumsum([len(sequences[i]) for i in part]).tolist()
        local = tuple(tuple(range(a, b)) for a, b in zip([0, *ends], ends, strict=False))
        rows = torch.tensor(index, device=batch.input_ids.device)
        found.append((rows, replace(batch.rows(rows, max(lengths[row] for row in index)), sequences=local)))
    return found


def _groups(batch: Batch) -> list[list[int]]:
    """The rows of each prompt, longest first."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group.tolist()):
        rows.setdefault(group, []).append(row)
    lengths = batch.lengths.tolist()
    return [sorted(group, key=lambda row: (-lengths[row], row)) for group in rows.values()]


def _joined(batch: Batch, group: list[int], budget: int, width: int) -> list[list[int]]:
    """The rows of a group, divided into sequences of k rows each, with the k that costs least.

    A sequence of T tokens costs T · (6 · width + T): in a layer of hidden size `width` its products take about
    24 · width² operations a token, and attention, whose masked entries are computed too, 4 · width · T.
    """
    start = int(batch.prompt_lengths[group[0]])
    lengths: list[int] = batch.lengths.tolist()

    def tokens(rows: list[int]) -> int:
        return start + sum(lengths[row] - start for row in rows)

    def divided(k: int) -> list[list[int]]:
        return [group[i : i + k] for i in range(0, len(group), k)]

    fits = [k for k in range(1, len(group) + 1) if k == 1 or max(map(tokens, divided(k))) <= budget]
    return min((divided(k) for k in fits), key=lambda parts: sum(t * (6 * width + t) for t in map(tokens, parts)))


def zero_weight_batch(batch: Batch) -> Batch:
    """The first row with all weights 0, for a rank that has fewer micro-batches than the others."""
    row = batch.rows(torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device))
    off = torch.zeros_like(row.completion_mask)
    zeros = torch.zeros_like(row.advantages)
    return replace(
        row,
        completion_mask=off,
        student_mask=off,
        masks=dict.fromkeys(row.masks, off),
        loss_weights=dict.fromkeys(row.loss_weights, zeros),
    )
