"""Divergences between student S and teacher T over the vocabulary, per token.

The caller has already divided the logits by the temperature. Computations are in at least fp32 (float64 is kept).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.config.kinds import DivergenceKind


def summands(log_s: Tensor, log_t: Tensor, kind: DivergenceKind, beta: float = 0.5) -> Tensor:
    """The contribution of each vocabulary entry to a divergence between S and T.

    forward_kl   T_v (log T_v − log S_v)
    reverse_kl   S_v (log S_v − log T_v)
    jsd          β T_v (log T_v − log M_v) + (1−β) S_v (log S_v − log M_v),  M = βT + (1−β)S,  β strictly in (0, 1)

    Args:
        log_s: [..., V] log-probs of the student; carries gradient.
        log_t: [..., V] log-probs of the teacher; detached. An entry of −inf on both sides contributes nothing.

    Returns: [..., V]; single entries may be negative. Raises: ValueError for β outside (0, 1).
    """
    assert log_s.shape == log_t.shape
    log_t = log_t.detach()
    if kind == "forward_kl":
        return _entries(log_t, log_s)
    if kind == "reverse_kl":
        return _entries(log_s, log_t)
    if not 0.0 < beta < 1.0:
        raise ValueError(f"expected 0 < beta < 1, got {beta}; use forward_kl (β → 0) or reverse_kl (β → 1)")
    absent = (log_s == -torch.inf) & (log_t == -torch.inf)  # their gradient through logaddexp would be NaN
    log_m = torch.logaddexp(
        log_t.masked_fill(absent, 0.0) + math.log(beta), log_s.masked_fill(absent, 0.0) + math.log1p(-beta)
    )
    return beta * _entries(log_t, log_m) + (1.0 - beta) * _entries(log_s, log_m)


def divergence(
    log_s: Tensor, log_t: Tensor, kind: DivergenceKind, beta: float = 0.5, clip: float | None = None
) -> Tensor:
    """Σ_v of `summands`, each limited to at most `clip` if it is given.

    The limit is per entry and only from above, so a clipped sum may be negative (OPSD, arXiv 2601.18734v3: a few style
    tokens carry most of the divergence). Args as in `summands`. Returns: [...].
    """
    terms = summands(log_s, log_t, kind, beta)
    return (terms if clip is None else terms.clamp(max=clip)).sum(-1)


MIN_TAIL_PROB = 1e-7
"""Lower bound of the total probability of the tokens outside the top k, so that its log is finite."""


def append_tail(logprobs: Tensor) -> Tensor:
    """[..., K] log-probs of some tokens → [..., K + 1]: the last entry is the log of the tail probability 1 − Σ p.

    Use it for a teacher that returned only these K log-probs. In fp32 the difference 1 − Σ p loses all precision near
    `MIN_TAIL_PROB`. `restrict_to` is exact; use it for anything that carries gradient.
    """
    rest = -torch.expm1(torch.logsumexp(logprobs, dim=-1, keepdim=True).clamp(max=-MIN_TAIL_PROB))
    return torch.cat([logprobs, rest.log()], dim=-1)


def restrict_to(logprobs: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Reduce a distribution over the vocabulary to the tokens `ids`.

    Args:
        logprobs: [..., V], of all tokens.
        ids: [..., K], each at most once. An id outside [0, V) is no token, and its entry is −inf.
        tail: True: add one entry for all other tokens. False: renormalise over the K tokens.

    Returns: [..., K + 1] or [..., K] log-probs.
    """
    width = logprobs.shape[-1]
    absent = (ids < 0) | (ids >= width)
    top = logprobs.gather(-1, ids.masked_fill(absent, 0)).masked_fill(absent, -torch.inf)
    if not tail:
        return renormalised(top)
    taken = torch.zeros(*logprobs.shape[:-1], width + 1, dtype=torch.bool, device=logprobs.device)
    taken = taken.scatter_(-1, ids.masked_fill(absent, width), True)[..., :width]
    rest = logprobs.masked_fill(taken, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest.masked_fill(rest == -torch.inf, math.log(MIN_TAIL_PROB))], dim=-1)


def renormalised(logprobs: Tensor) -> Tensor:
    """[..., K] log-probs of some tokens → their log-probs, normalised over these K tokens."""
    return logprobs - torch.logsumexp(logprobs, dim=-1, keepdim=True)


def _entries(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p − log q), 0 where p is 0."""
    return log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p - log_q)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(T‖S) = Σ_v T_v (log T_v − log S_v). Gradient through the student only.

    Args: both [B, T, V]. Returns: [B, T], ≥ 0.
    """
    return divergence(_log_softmax(student_logits), _log_softmax(teacher_logits), "forward_kl")


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(S‖T) = Σ_v S_v (log S_v − log T_v). Gradient through the student only.

    Args: both [B, T, V]. Returns: [B, T], ≥ 0.
    """
    return divergence(_log_softmax(student_logits), _log_softmax(teacher_logits), "reverse_kl")


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """β·KL(T‖M) + (1−β)·KL(S‖M), M = βT + (1−β)S. GKD, arXiv 2306.13649, Eq. 1.

    The value tends to 0 at both ends. Divided by β it tends to KL(T‖S) as β → 0; divided by 1−β it tends to KL(S‖T) as
    β → 1. The end points are not replaced by these limits, so β must be strictly between 0 and 1.

    Args:
        student_logits, teacher_logits: [B, T, V].
        beta: in (0, 1).

    Returns: [B, T], ≥ 0. Raises: ValueError for β outside (0, 1).
    """
    return divergence(_log_softmax(student_logits), _log_softmax(teacher_logits), "jsd", beta)
