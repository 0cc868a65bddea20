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


def advantage_shaping(
    logprobs: Tensor, advantages: Tensor, gamma_min: float, gamma_max: float, advantage_max: float = 4.0
) -> Tensor:
    """L_t = −A_t · π_t / (sg(π_t) + γ_t), with γ_t = clamp(γ_min + (γ_max − γ_min) · f_t, γ_min, γ_max) and
    f_t = (A_max − A_t) / (2 A_max).

    Advantage-aware shaping of ThinkTuning, arXiv 2508.07616, in the form that its code intends: for tokens that another
    wrote, without an old policy. Its gradient is −A_t · π_t / (π_t + γ_t) · ∇log π_t: the surer the advantage, the
    smaller γ, and the larger the step on a token that the student finds unlikely. The ratio is at most 1, since γ ≥ 0.
    (The released `clamp(γ, 0.001, −0.001)` gives γ = −0.001 whatever the advantage, and a ratio without bound.)

    Args:
        logprobs: [B, T] of the current policy; carries gradient.
        advantages: [B, T]; detached.
        gamma_min, gamma_max: γ at advantages of A_max and more, and of −A_max and less; 0 ≤ γ_min ≤ γ_max.
        advantage_max: A_max.

    Returns: [B, T], to be minimised.
    """
    assert logprobs.shape == advantages.shape and 0.0 <= gamma_min <= gamma_max
    advantages, fixed = advantages.detach(), logprobs.detach()
    f = (advantage_max - advantages) / (2.0 * advantage_max)
    gamma = (gamma_min + (gamma_max - gamma_min) * f).clamp(gamma_min, gamma_max)
    # π / (π + γ) by logarithms: at γ = 0 it is 1 even where π underflows.
    share = torch.exp(fixed - torch.logaddexp(fixed, gamma.log()))
    return -advantages * share * torch.exp(logprobs - fixed)
