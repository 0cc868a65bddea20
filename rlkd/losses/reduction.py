"""Normalisation as data: weights [B, T] made once an update from counts over all ranks and micro-batches.

A loss term is Σ per_token · weights. Since the counts are global, splitting into micro-batches or ranks changes no
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkd.config.kinds import Reduction


def counts(mask: Tensor) -> tuple[int, int]:
    """(tokens, sequences with a token) under `mask` [B, T], to be added up over the ranks."""
    return int(mask.sum()), int(mask.any(dim=1).sum())


def reduction_weights(mask: Tensor, reduction: Reduction, tokens: float, sequences: float, max_tokens: int) -> Tensor:
    """The weight of every token.

    token_mean     mask / N_tokens               DAPO, arXiv 2503.14476; KDRL, arXiv 2506.02208, Eq. 8
    sequence_mean  mask / (len_i · N_sequences)  GRPO, arXiv 2402.03300, Eq. 3
    dr_grpo        mask / (N_sequences · L_max)  Dr. GRPO, arXiv 2503.20783

    Args:
        mask: [B, T] bool, the tokens that this term acts on.
        tokens, sequences: their counts over all ranks and micro-batches; 0 gives weights of 0.
        max_tokens: L_max, the completion budget.

    Returns: [B, T] fp32; over all ranks token_mean and sequence_mean sum to 1.
    """
    mask_f = mask.float()
    if reduction == "token_mean":
        return mask_f / max(tokens, 1.0)
    if reduction == "sequence_mean":
        lengths = mask_f.sum(dim=1, keepdim=True).clamp(min=1.0)
        return mask_f / (lengths * max(sequences, 1.0))
    return mask_f / (max(sequences, 1.0) * max_tokens)


def weighted_sum(per_token: Tensor, weights: Tensor) -> Tensor:
    """Σ per_token · weights; what stands on a token of weight 0 does not matter, even a NaN.

    That holds for `per_token` itself. If it was made by a function that is not finite there, the backward pass of
    that function still gives 0 · inf: mask what goes into it.

    Args: both [B, T]. Returns: a scalar that keeps the graph alive when all weights are 0.
    """
    assert per_token.shape == weights.shape
    return (torch.where(weights != 0, per_token, 0.0) * weights).sum()
