"""Loss weights [B, T], made once per update from counts over all ranks and micro-batches.

A loss term is Σ per_token · weights. Since the counts are global, the gradient does not depend on how the rollouts are
split into micro-batches and ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkd.config.kinds import Reduction


def counts(mask: Tensor) -> Tensor:
    """[2] int64: tokens, and sequences with at least one token, in `mask` [B, T]; the caller sums over the ranks."""
    return torch.stack([mask.sum(), mask.any(dim=1).sum()])


def reduction_weights(mask: Tensor, reduction: Reduction, tokens: float, sequences: float, max_tokens: int) -> Tensor:
    """The loss weight of every token.

    token_mean     mask / N_tokens               DAPO, arXiv 2503.14476; KDRL, arXiv 2506.02208, Eq. 8
    sequence_mean  mask / (len_i · N_sequences)  GRPO, arXiv 2402.03300, Eq. 3
    dr_grpo        mask / (N_sequences · L_max)  Dr. GRPO, arXiv 2503.20783

    Args:
        mask: [B, T] bool, the tokens that this term acts on.
        tokens, sequences: their counts over all ranks and micro-batches; 0 gives weights of 0.
        max_tokens: L_max, the maximal number of completion tokens.

    Returns: [B, T] fp32; the weights of token_mean and sequence_mean sum to 1 over all ranks.
    """
    mask_f = mask.float()
    if reduction == "token_mean":
        return mask_f / max(tokens, 1.0)
    if reduction == "sequence_mean":
        lengths = mask_f.sum(dim=1, keepdim=True).clamp(min=1.0)
        return mask_f / (lengths * max(sequences, 1.0))
    return mask_f / (max(sequences, 1.0) * max_tokens)


def weighted_sum(per_token: Tensor, weights: Tensor) -> Tensor:
    """Σ per_token · weights. The value of a token with weight 0 is ignored, even if it is NaN.

    This protects only against `per_token` itself. If the function that computed it is not finite there, its backward
    pass still gives 0 · inf = NaN, so mask the inputs of that function.

    Args: both [B, T]. Returns: a scalar that stays connected to the graph even if all weights are 0.
    """
    assert per_token.shape == weights.shape
    return (torch.where(weights != 0, per_token, 0.0) * weights).sum()
