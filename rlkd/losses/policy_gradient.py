"""Policy-gradient loss terms, per token."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t), ρ_t = exp(log π_t − log π_old,t).

    PPO, arXiv 1707.06347, Eq. 7; separate clip bounds as in DAPO, arXiv 2503.14476, Eq. 8. At ρ = 1 its gradient is
    that of REINFORCE, −A_t ∇log π_t. With `dual_clip` = c the loss is at most −c A_t if A_t < 0 (arXiv 1912.09729,
    Eq. 5), which bounds the loss of a token that has become much more likely.

    Args:
        logprobs: [B, T] of the current policy; carries gradient.
        old_logprobs: [B, T] of the policy at the start of the iteration; detached.
        advantages: [B, T]; detached.
        clip_low, clip_high: ε_low, ε_high ≥ 0.
        dual_clip: c > 1.

    Returns: [B, T], to be minimised.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape
    ratio = torch.exp(logprobs - old_logprobs.detach())
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    advantages = advantages.detach()
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def clipped_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """[B, T] bool: the tokens for which `clipped_surrogate` has no gradient because a clip bound is active."""
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    high, low = (advantages > 0) & (ratio > 1.0 + clip_high), (advantages < 0) & (ratio < 1.0 - clip_low)
    if dual_clip is None:
        return high | low
    return high | low | ((advantages < 0) & (ratio > dual_clip))


def cispo_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cap: float) -> Tensor:
    """L_t = −sg[min(ρ_t, cap)] A_t log π_t, ρ_t = exp(log π_t − log π_old,t).

    CISPO, arXiv 2506.13585, Eq. 4 and 5: REINFORCE with a truncated importance weight. Unlike the clipped surrogate
    it gives every token a gradient. `cap` is the paper's 1 + ε_high; the paper uses no lower bound either. The value is
    not an objective; only its gradient is meaningful.

    Args: as in `clipped_surrogate`. Returns: [B, T], to be minimised.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape
    weight = torch.exp(logprobs.detach() - old_logprobs.detach()).clamp(max=cap)
    return -weight * advantages.detach() * logprobs


def capped_tokens(logprobs: Tensor, old_logprobs: Tensor, cap: float) -> Tensor:
    """[B, T] bool: the tokens for which the cap of `cispo_surrogate` is active."""
    return torch.exp(logprobs.detach() - old_logprobs) > cap


def sequence_old_logprobs(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The `old_logprobs` to pass to a surrogate so that every token's ratio becomes the ratio of its sequence.

    The ratio of the sequence is s = exp(1/|y| Σ_t (log π_t − log π_old,t)) (GSPO, arXiv 2507.18071, Eq. 7). The ratio
    of a token is s_t = sg[s] · π_t / sg[π_t] (GSPO-token, Eq. 14), which has the value s and the gradient s ∇log π_t.
    If all tokens of a sequence have the same advantage and weight, their sum has the gradient of s itself; unlike s,
    s_t also allows advantages per token. Since log s_t = log π_t − (sg[log π_t] − sg[log s]), this function returns the
    bracket in place of log π_old,t.

    Args:
        logprobs: [B, T] of the current policy.
        old_logprobs: [B, T] of the policy at the start of the iteration.
        mask: [B, T] bool, the tokens of the sequences. A row without any gets ratio 1.

    Returns: [B, T] without gradient.
    """
    assert logprobs.shape == old_logprobs.shape == mask.shape
    current = logprobs.detach()
    log_ratio = torch.where(mask, current - old_logprobs.detach(), 0.0)
    return current - log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def advantage_shaping(
    logprobs: Tensor, advantages: Tensor, gamma_min: float, gamma_max: float, advantage_max: float = 4.0
) -> Tensor:
    """L_t = −A_t · π_t / (sg(π_t) + γ_t), with γ_t = clamp(γ_min + (γ_max − γ_min) · f_t, γ_min, γ_max) and
    f_t = (A_max − A_t) / (2 A_max).

    Our reading of the advantage-aware shaping of ThinkTuning, arXiv 2508.07616. It is for tokens that the student did
    not write, so there is no old policy. Its gradient is −A_t · π_t / (π_t + γ_t) · ∇log π_t: a larger advantage gives
    a smaller γ, and a larger step on a token that the student finds unlikely. The ratio is at most 1, since γ ≥ 0.

    In the released code the parameter names imply that γ grows as A falls, as here. The arguments of its call would
    reverse that if its clamp worked: +0.001 at A = 4, −0.001 at A = −4. As written, `clamp(γ, 0.001, −0.001)` gives
    γ = −0.001 for any advantage: the ratio is unbounded near π = 0.001, and is the plain one, about 1, below.

    Args:
        logprobs: [B, T] of the current policy; carries gradient.
        advantages: [B, T]; detached.
        gamma_min, gamma_max: γ for advantages ≥ A_max and for advantages ≤ −A_max; 0 ≤ γ_min ≤ γ_max.
        advantage_max: A_max.

    Returns: [B, T], to be minimised.
    """
    assert logprobs.shape == advantages.shape and 0.0 <= gamma_min <= gamma_max
    advantages, fixed = advantages.detach(), logprobs.detach()
    f = (advantage_max - advantages) / (2.0 * advantage_max)
    gamma = (gamma_min + (gamma_max - gamma_min) * f).clamp(gamma_min, gamma_max)
    # π / (π + γ) is computed from logarithms, so that it is 1 at γ = 0 even if π underflows.
    share = torch.exp(fixed - torch.logaddexp(fixed, gamma.log()))
    return -advantages * share * torch.exp(logprobs - fixed)
