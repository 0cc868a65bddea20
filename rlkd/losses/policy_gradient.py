"""Policy-gradient terms, per token."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t), ρ_t = exp(log π_t − log π_old,t).

    PPO, arXiv 1707.06347, Eq. 7; two clip bounds as in DAPO, arXiv 2503.14476, Eq. 8. At ρ = 1 its gradient is
    REINFORCE's, −A_t ∇log π_t.

    Args:
        logprobs: [B, T] of the current policy; carries gradient.
        old_logprobs: [B, T] of the policy at the start of the iteration; detached.
        advantages: [B, T]; detached.
        clip_low, clip_high: ε_low, ε_high ≥ 0.

    Returns: [B, T], to be minimised.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape
    ratio = torch.exp(logprobs - old_logprobs.detach())
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """[B, T] bool: where `clipped_surrogate` has no gradient because the clip binds."""
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    return ((advantages > 0) & (ratio > 1.0 + clip_high)) | ((advantages < 0) & (ratio < 1.0 - clip_low))
