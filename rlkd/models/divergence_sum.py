"""The weighted sum of the tokens' divergences with its gradient, chunk by chunk, from the student's hidden states.

A measure computes the divergences of one chunk and their slopes with respect to the student's raw logits: `ByFormula`
where the formulas of `losses/divergence_slopes.py` apply, and `by_autograd` for everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkd.losses import DivergenceKind
from rlkd.losses.divergence_slopes import values_and_slopes
from rlkd.losses.lm_head import OutputLayer, add_product, project_into, projected, shape_in_place


class Measured(NamedTuple):
    """The divergences of a chunk of n tokens, and their gradients with respect to the raw logits: slopes · factor."""

    values: Tensor  # [n]
    slopes: Tensor | None  # [V, n]; None where no gradient was asked for
    factor: Tensor  # [n]


Measure = Callable[[Tensor, Tensor, Tensor | None, slice, bool], Measured]
"""(hidden [n, H], weight [V, H], bias [V], the chunk of tokens, whether slopes are wanted) → their divergences. The
tensors of one call are overwritten by the next."""


def by_autograd(values: Callable[[Tensor, slice], Tensor]) -> Measure:
    """The measure of any function (raw logits [n, V], the chunk) → divergences [n]."""

    def measure(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: slice, learns: bool) -> Measured:
        raw = projected(hidden, weight, bias)
        with torch.set_grad_enabled(learns):
            found = values(raw.requires_grad_(learns), chunk)
            slopes = torch.autograd.grad(found.sum(), raw)[0].T if learns else None
        return Measured(found.detach(), slopes, torch.ones_like(found))

    return measure


@dataclass(kw_only=True)
class ByFormula:
    """The measure of a divergence over the full vocabulary, in two tensors [V, n] that all chunks share.

    The student's raw logits r become z = r · scale / temperature, or with a soft cap c
    z = c tanh(r · scale / c) / temperature, so a slope with respect to z times
    dz/dr = (1 − tanh²) · scale / temperature is the slope with respect to r.
    """

    teacher: OutputLayer
    states: Callable[[slice], Tensor]
    """The teacher's hidden states [n, ≥ H] of a chunk, on the student's device."""
    scale: float
    softcap: float | None
    temperature: float
    kind: DivergenceKind
    beta: float
    clip: float | None
    blend: float | None
    targets: Callable[[slice], Tensor]
    """The ids [n] of a chunk's tokens."""
    note: Callable[[slice, Tensor, Tensor], None] | None
    """Told a chunk and the student's log-probs and entropies, both [n], of its tokens; None: they are not computed."""
    _memory: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: slice, learns: bool) -> Measured:
        """See `Measure`."""
        shape = len(weight), len(hidden)
        student, teacher = (self._tensor(name, shape, weight) for name in ("student", "teacher"))
        project_into(student, hidden, weight, bias)
        shape_in_place(student, self.scale, self.softcap)
        self.teacher.logits_into(teacher, self.states(chunk))
        if self.blend is not None:
            torch.lerp(student, teacher, self.blend, out=teacher)
        bend = None
        if self.softcap is not None and learns:
            bend = torch.div(student, self.softcap, out=self._tensor("bend", shape, weight))
            bend.square_().neg_().add_(1.0)
        if self.temperature != 1.0:
            student /= self.temperature
            teacher /= self.temperature
        at_targets = None if self.note is None else student.gather(0, self.targets(chunk)[None])[0]
        entropy = self.note is not None
        found = values_and_slopes(student, teacher, self.kind, self.beta, self.clip, entropy=entropy)
        if self.note is not None:
            assert at_targets is not None and found.entropy is not None
            self.note(chunk, at_targets - found.log_z, found.entropy)
        if bend is not None:
            found.slopes.mul_(bend)
        return Measured(found.values, found.slopes, found.factor * (self.scale / self.temperature))

    def _tensor(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A contiguous tensor whose content is lost in the next chunk. The first chunk is the longest."""
        size, dtype = shape[0] * shape[1], torch.promote_types(like.dtype, torch.float32)
        if name not in self._memory:
            self._memory[name] = like.new_empty(size, dtype=dtype)
        return self._memory[name][:size].view(shape)


class ChunkedSum(torch.autograd.Function):
    """Σ_n weights_n · D_n, where a measure computes D_n from the logits = hidden · weightᵀ + bias of a chunk of tokens.

    The gradient is computed in the forward pass, so that the logits of a chunk can be freed after it. With the slopes
    G = dD/dlogits [n, V] and w_n the weights:

        d/dhidden = w_n Σ_v G_nv weight_v,    d/dweight = Σ_n G_nvᵀ (w_n hidden_n),    d/dbias = Σ_n w_n G_nv.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        weights: Tensor,  # [N]
        measure: Measure,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        learns = any(ctx.needs_input_grad[:3])
        total = weights.new_zeros(())
        found = torch.zeros_like(weights)
        at_least = torch.promote_types(weight.dtype, torch.float32)
        of_hidden = torch.zeros_like(hidden, dtype=at_least) if learns else None
        of_weight = torch.zeros_like(weight, dtype=at_least) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=at_least) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), step):
            chunk = slice(start, start + step)
            values, slopes, factor = measure(hidden[chunk], weight, bias, chunk, learns)
            total += (values * weights[chunk]).sum()
            found[chunk] = values
            if of_hidden is not None:
                assert slopes is not None
                rates = (factor * weights[chunk]).to(at_least)[:, None]
                of_hidden[chunk] = rates * (slopes.T.to(weight.dtype) @ weight)
                if of_weight is not None:
                    add_product(of_weight, slopes, rates * hidden[chunk], weight.dtype)
                if of_bias is not None:
                    of_bias += (slopes @ rates)[:, 0]
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(found)
        return total, found

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if found is None else (found * slope).to(dtype) for found, dtype in gradients), None, None, None)
