"""Divergences of a student and a teacher over the full vocabulary with their gradients, by formula and in place.

`divergence` gives the same numbers through autograd, for any pair of log-probs; it keeps about eight tensors of the
logits' size. These functions overwrite the logits of both models and need two, and a few tiles that stay in the cache.
Logits are [V, n] here, a column per token: the products with the output layer's weight [V, H] are fastest that way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlkd.config.kinds import DivergenceKind

TILE_LOGITS = 2**21
"""Logits that a CPU works on at a time, 8 MiB in fp32. Smaller tiles stay in the cache from one operation to the next,
larger ones need fewer operations, at each of which threads wait for each other. A GPU works on all logits at once."""


class Slopes(NamedTuple):
    """The divergences of n tokens and their gradients with respect to the student's logits: slopes · factor."""

    values: Tensor  # [n]
    slopes: Tensor  # [V, n]
    factor: Tensor  # [n]; the caller can apply it to a smaller tensor
    log_z: Tensor  # [n], log Σ_v exp z_v of the student
    entropy: Tensor | None  # [n], of the student


def values_and_slopes(
    student: Tensor,
    teacher: Tensor,
    kind: DivergenceKind,
    beta: float = 0.5,
    clip: float | None = None,
    *,
    entropy: bool = False,
) -> Slopes:
    """The divergence D of every token and its gradient with respect to the student's logits.

    With the probabilities S and T of student and teacher, the gradient with respect to logit v is

        dD/dz_v = g_v − S_v Σ_u g_u,    g_v = dD/d(log S_v),

    because log S_v = z_v − log Σ_u exp z_u. What g is for each divergence stands in the functions below.

    Args:
        student: [V, n] logits, divided by the temperature, finite. Overwritten.
        teacher: [V, n], likewise. Overwritten.
        kind, beta, clip: as in `divergence`.
        entropy: whether to compute it.

    Returns: see `Slopes`; the slopes are in the memory of `student` or `teacher`.
    Raises: ValueError for β outside (0, 1).
    """
    assert student.shape == teacher.shape and student.dtype == teacher.dtype
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"expected 0 < beta < 1, got {beta}; use forward_kl (β → 0) or reverse_kl (β → 1)")
    if clip is None and kind == "reverse_kl":
        return _reverse_kl(student, teacher, entropy)
    if clip is None and kind == "forward_kl":
        return _forward_kl(student, teacher, entropy)
    return _from_entries(student, teacher, kind, beta, clip, entropy)


def _reverse_kl(student: Tensor, teacher: Tensor, entropy: bool) -> Slopes:
    """KL(S‖T) and its gradient S_v (log S_v − log T_v − KL(S‖T)).

    With s and t the logits minus their maxima, e = exp s, Z_S = Σ e, Z_T = Σ exp t, a = s − t and ā = Σ e a / Z_S, the
    value is ā − log Z_S + log Z_T and the gradient e_v (a_v − ā) / Z_S: the constants of the softmax cancel in it.
    """
    tops, (z_s, z_t, moment, own) = (_maxima(student), _maxima(teacher)), _zeros(4, student)
    for s, t, spare in _tiles(student, teacher, spares=1):
        s -= tops[0]
        t -= tops[1]
        z_t += torch.exp(t, out=spare).sum(0)
        torch.sub(s, t, out=t)
        _add_exponentials(s, z_s, own if entropy else None, spare)
        moment += t.mul_(s).sum(0)
    mean = moment / z_s
    for e, ea in _tiles(student, teacher):
        ea.addcmul_(e, mean, value=-1)
    return Slopes(
        mean - z_s.log() + z_t.log(), teacher, 1 / z_s, z_s.log() + tops[0], z_s.log() - own / z_s if entropy else None
    )


def _forward_kl(student: Tensor, teacher: Tensor, entropy: bool) -> Slopes:
    """KL(T‖S) and its gradient S_v − T_v.

    With s and t the logits minus their maxima, Z_S = Σ exp s and Z_T = Σ exp t, the value is
    Σ exp(t) (t − s) / Z_T − log Z_T + log Z_S.
    """
    tops, (z_s, z_t, moment, own) = (_maxima(student), _maxima(teacher)), _zeros(4, student)
    for s, t, spare in _tiles(student, teacher, spares=1):
        s -= tops[0]
        t -= tops[1]
        torch.sub(t, s, out=spare)
        z_t += t.exp_().sum(0)
        moment += spare.mul_(t).sum(0)
        _add_exponentials(s, z_s, own if entropy else None, spare)
    ratio = z_s / z_t
    for e_s, e_t in _tiles(student, teacher):
        e_s.addcmul_(e_t, ratio, value=-1)
    value = moment / z_t - z_t.log() + z_s.log()
    return Slopes(value, student, 1 / z_s, z_s.log() + tops[0], z_s.log() - own / z_s if entropy else None)


def _from_entries(
    student: Tensor, teacher: Tensor, kind: DivergenceKind, beta: float, clip: float | None, entropy: bool
) -> Slopes:
    """Any divergence, entry by entry: Σ_v min(d_v, clip), where g_v = 0 for the entries above the clip."""
    tops, (z_s, z_t, value, total, own) = (_maxima(student), _maxima(teacher)), _zeros(5, student)
    for s, t, spare in _tiles(student, teacher, spares=1):
        s -= tops[0]
        t -= tops[1]
        z_s += torch.exp(s, out=spare).sum(0)
        if entropy:
            own += spare.mul_(s).sum(0)
        z_t += torch.exp(t, out=spare).sum(0)
    own /= z_s
    z_s.log_()
    z_t.log_()
    for s, t, *spares in _tiles(student, teacher, spares=2):
        s -= z_s
        t -= z_t
        entries, slopes = _ENTRIES[kind](s, t, spares, beta)
        if clip is not None:
            slopes.masked_fill_(entries > clip, 0.0)
            entries.clamp_(max=clip)
        value += entries.sum(0)
        total += slopes.sum(0)
        t.copy_(slopes)
    for s, g in _tiles(student, teacher):
        g.addcmul_(s, total, value=-1)
    return Slopes(value, teacher, torch.ones_like(value), z_s + tops[0], z_s - own if entropy else None)


def _forward_entries(s: Tensor, t: Tensor, spares: list[Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """d = T (log T − log S) and g = −T; log-probs s → probabilities."""
    prob_t = torch.exp(t, out=spares[0])
    entries = t.sub_(s).mul_(prob_t)
    s.exp_()
    return entries, prob_t.neg_()


def _reverse_entries(s: Tensor, t: Tensor, spares: list[Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """d = S (log S − log T) and g = d + S; log-probs s → probabilities."""
    torch.sub(s, t, out=t)
    entries = t.mul_(s.exp_())
    return entries, torch.add(entries, s, out=spares[0])


def _jsd_entries(s: Tensor, t: Tensor, spares: list[Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """d = β T (log T − log M) + (1−β) S (log S − log M) and g = (1−β) S (log S − log M), M = βT + (1−β)S; log-probs s →
    probabilities.

    In dd/d(log S) the derivatives of log M and of S add up to (1−β) S (1 − (βT + (1−β)S) / M) = 0.
    """
    log_m, prob = spares
    torch.exp(s, out=log_m).lerp_(torch.exp(t, out=prob), beta)
    log_m.clamp_(min=torch.finfo(log_m.dtype).tiny).log_()  # both may underflow to 0, and 0 · ∞ is not 0
    entries = t.sub_(log_m).mul_(prob).mul_(beta)
    torch.exp(s, out=prob)
    slopes = torch.sub(s, log_m, out=log_m).mul_(prob).mul_(1.0 - beta)
    s.copy_(prob)
    return entries.add_(slopes), slopes


_ENTRIES = {"forward_kl": _forward_entries, "reverse_kl": _reverse_entries, "jsd": _jsd_entries}


def _add_exponentials(s: Tensor, z: Tensor, moment: Tensor | None, spare: Tensor) -> None:
    """s becomes e = exp s, whose sum over the rows is added to z, and Σ e s to `moment`, if there is one."""
    if moment is None:
        z += s.exp_().sum(0)
    else:
        e = torch.exp(s, out=spare)
        z += e.sum(0)
        moment += s.mul_(e).sum(0)
        s.copy_(e)


def _maxima(logits: Tensor) -> Tensor:
    """[V, n] → [n]: the largest logit of every token."""
    return torch.stack([tile.amax(0) for (tile,) in _tiles(logits)]).amax(0)


def _zeros(count: int, logits: Tensor) -> tuple[Tensor, ...]:
    """`count` sums over the vocabulary of `logits` [V, n], each [n]."""
    return tuple(logits.new_zeros(logits.shape[1]) for _ in range(count))


def _tiles(*whole: Tensor, spares: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all the tensors [V, n] at a time, and as many spare tensors of that shape, whose content is lost."""
    rows, columns = whole[0].shape
    step = rows if whole[0].is_cuda else min(rows, max(1, TILE_LOGITS // columns))
    unused = [whole[0].new_empty(step, columns) for _ in range(spares)]
    for start in range(0, rows, step):
        parts = [tensor[start : start + step] for tensor in whole]
        yield (*parts, *(spare[: len(parts[0])] for spare in unused))
