"""The weight of every token in every term of a loss: the only place where normalisation is decided."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from rlkd import distributed
from rlkd.algorithms.base import Algorithm
from rlkd.losses import counts, reduction_weights
from rlkd.types import Batch


def with_loss_weights(batch: Batch, algorithm: Algorithm) -> Batch:
    """The batch, this rank's share of one update, with `loss_weights` for all terms of the algorithm. A collective.

    Counts are over all ranks and micro-batches, so the split does not change the gradient.

    Raises: RunStopped if the ranks have different terms.
    """
    terms = algorithm.terms
    masks = sorted({term.counted for term in terms.values()})
    distributed.require_same_names(sorted({*terms, *masks}), "the terms of the loss")
    summed = distributed.all_reduce(torch.cat([counts(batch.mask(name)) for name in masks]).tolist())
    weights = {}
    for name, term in terms.items():
        tokens, sequences = summed[2 * masks.index(term.counted) :][:2]
        everywhere = reduction_weights(
            batch.mask(term.counted),
            term.reduction,
            tokens,
            sequences / term.sequences_per_unit,
            algorithm.longest_completion,
        )
        under = functools.reduce(torch.logical_and, (batch.mask(mask) for mask in term.masks))
        weights[name] = torch.where(under, everywhere, 0.0)
    return replace(batch, loss_weights=weights)
