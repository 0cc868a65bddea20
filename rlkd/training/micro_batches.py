"""Splits one rank's rollouts into updates, and each update into micro-batches with a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from rlkd.types import Batch


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


def split_by_tokens(batch: Batch, budget: int) -> list[torch.Tensor]:
    """Row indices of micro-batches, longest rows first, each with rows × longest row ≤ budget tokens.

    Rows of similar length go together, which keeps padding small. Raises: ValueError if one row exceeds the budget.
    """
    lengths = batch.lengths.tolist()
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if lengths[order[0]] > budget:
        raise ValueError(
            f"trainer.micro_batch_tokens: expected at least {lengths[order[0]]}, the tokens of a rollout, got "
            f"{budget}; raise it"
        )
    parts: list[list[int]] = []
    for row in order:
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return [torch.tensor(part, device=batch.input_ids.device) for part in parts]


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
