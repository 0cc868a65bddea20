"""KL estimators on sampled tokens, per token, and the importance weight between sampler and trainer.

With R = log T(y) − log π(y) on a token y ~ π (by enumeration over a vocabulary, `tests/unit/losses/test_losses.py`):

    estimator          E[value]         E[gradient] when back-propagated
    k1 = −R            KL(π‖T)          0: no training signal, so it is not offered as a loss
    k2 = ½R²           (not a KL)       ∇KL(π‖T), the reverse KL
    k3 = e^R − R − 1   KL(π‖T)          ∇KL(T‖π), the forward KL
    R as advantage     −KL(π‖T)         ∇KL(π‖T) through −R·∇log π

Source of k1, k2, k3: J. Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def kl_k2(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """½ (log T − log π)². On student samples, its expected gradient is ∇KL(π‖T).

    Args:
        logprobs: [B, T] of the student; carries gradient.
        teacher_logprobs: [B, T] of the teacher on the same tokens; detached.

    Returns: [B, T].
    """
    assert logprobs.shape == teacher_logprobs.shape
    return 0.5 * (teacher_logprobs.detach() - logprobs).square()


def kl_k3(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """exp(R) − R − 1, R = log T − log π. Its expected value is KL(π‖T), its expected gradient ∇KL(T‖π).

    Args and returns as in `kl_k2`. Non-negative.
    """
    assert logprobs.shape == teacher_logprobs.shape
    log_ratio = teacher_logprobs.detach() - logprobs
    return torch.expm1(log_ratio) - log_ratio


def kl_k1_advantage(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """log T − log π, detached: an advantage whose policy gradient is that of −KL(π‖T) in expectation.

    Args: both [B, T]. Returns: [B, T] without gradient.
    """
    assert logprobs.shape == teacher_logprobs.shape
    return (teacher_logprobs - logprobs).detach()


def importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    student_mask: Tensor,
    mode: Literal["truncate", "mask"],
    cap: float,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """w = exp(log π_old − log π_sampler), which corrects for sampler and trainer computing different probabilities.

    Truncated importance sampling: min(w, cap) (Yao et al., "Your efficient RL framework secretly brings you
    off-policy RL training", 2025). Mode `mask` drops tokens with w > cap instead. At level `sequence` w is the product
    over the student's tokens of a row, which is the exact weight of the completion; the token-level weight is biased
    but has less variance. The product varies more in longer completions, so the cap binds more often.

    Args:
        old_logprobs: [B, T] of the trainer, at the start of the iteration.
        sampler_logprobs: [B, T] of the sampler; NaN where `student_mask` is false.
        student_mask: [B, T] bool; other tokens get weight 1.

    Returns: [B, T] without gradient.
    """
    assert old_logprobs.shape == sampler_logprobs.shape == student_mask.shape
    log_ratio = torch.where(student_mask, old_logprobs.detach() - sampler_logprobs, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    weights = torch.exp(log_ratio)
    if mode == "truncate":
        weights = weights.clamp(max=cap)
    else:
        weights = torch.where(weights > cap, 0.0, weights)
    return torch.where(student_mask, weights, 1.0)


def token_ratios(
    logprobs: Tensor, old_logprobs: Tensor, sampler_logprobs: Tensor, student_mask: Tensor, cap: float
) -> Tensor:
    """min(π/π_old, cap) · min(π_old/π_sampler, cap) for each token that the student sampled.

    The code of SDPO (arXiv 2601.20802) multiplies the divergence at each token by this factor, so that tokens count
    less when the current policy is unlikely to sample them. It does not correct for prefixes that older weights
    sampled: without a cap its expectation is 1 after any prefix, and the divergence at a token depends only on its
    prefix.

    Args:
        logprobs: [B, T] of the current policy.
        old_logprobs: [B, T] of the trainer, at the start of the iteration.
        sampler_logprobs: [B, T] of the sampler; NaN where `student_mask` is false.
        student_mask: [B, T] bool; other tokens get 1.

    Returns: [B, T] without gradient.
    """
    current, old = logprobs.detach(), old_logprobs.detach()
    weights = importance_weights(old, sampler_logprobs, student_mask, "truncate", cap)
    ratio = torch.exp(torch.where(student_mask, current - old, 0.0)).clamp(max=cap)
    return ratio * weights
