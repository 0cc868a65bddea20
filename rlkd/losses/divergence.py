"""Divergences over the whole vocabulary, per token, from logits.

Conventions: S = softmax(student_logits), T = softmax(teacher_logits); both are compared at the temperature that the
caller has divided the logits by. At least fp32 inside (float64 is kept).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(T‖S) = Σ_v T_v (log T_v − log S_v). Gradient through the student only.

    Args: both [B, T, V]. Returns: [B, T], ≥ 0.
    """
    return _kl(_log_softmax(teacher_logits.detach()), _log_softmax(student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(S‖T) = Σ_v S_v (log S_v − log T_v). Gradient through the student only.

    Args: both [B, T, V]. Returns: [B, T], ≥ 0.
    """
    return _kl(_log_softmax(student_logits), _log_softmax(teacher_logits.detach()))


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """β·KL(T‖M) + (1−β)·KL(S‖M), M = βT + (1−β)S. GKD, arXiv 2306.13649, Eq. 1.

    The value tends to 0 at both ends: divided by β it tends to KL(T‖S) as β → 0, and by 1−β to KL(S‖T) as β → 1.
    We do not jump to those limits at the end points, so β lies strictly between.

    Args:
        student_logits, teacher_logits: [B, T, V].
        beta: in (0, 1).

    Returns: [B, T], ≥ 0. Raises: ValueError for another β.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}, wants 0 < beta < 1; use forward_kl (β → 0) or reverse_kl (β → 1)")
    log_s, log_t = _log_softmax(student_logits), _log_softmax(teacher_logits.detach())
    log_beta, log_rest = torch.tensor([beta, 1.0 - beta], dtype=log_s.dtype, device=log_s.device).log().unbind()
    log_m = torch.logaddexp(log_t + log_beta, log_s + log_rest)
    return beta * _kl(log_t, log_m) + (1.0 - beta) * _kl(log_s, log_m)
