"""Hidden states → log-probs and entropy of given tokens, and divergences, without a [B, T, V] tensor.

Only this file wraps TRL's kernel, which is not part of TRL's public API, so the version is pinned. Only this file does
the shift by one position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rlkd.losses import DivergenceKind, append_tail, divergence, renormalised, restrict_to
from rlkd.losses.lm_head import OutputLayer, logit_transform, shaped
from rlkd.models.divergence_sum import ByFormula, ChunkedSum, Measure, by_autograd
from rlkd.types import Batch, BatchScores

VOCABULARY_CHUNK = {"cpu": 1024, "cuda": 8192}
"""On a GPU, and on any other device: columns of logits in memory at a time, for up to 4,096 tokens. On a CPU fewer of
them stay in the cache: for 1,024 tokens, forward and backward take half the time that they take with 8,192 columns."""
CHUNK_LOGITS = 2**24
"""Logits that are in memory at a time in a divergence: 64 MiB in fp32, in about eight tensors of that size."""
GPU_CHUNK_LOGITS = 2**28
"""The same on a GPU with room for them, where reading the output layer and its gradient for each chunk takes long."""
BYTES_PER_LOGIT = 32
"""Of the eight tensors."""


@dataclass(frozen=True, kw_only=True)
class DivergenceSpec:
    """A divergence between student and teacher, over the full vocabulary or a part of it."""

    kind: DivergenceKind
    temperature: float
    """Used for both models."""
    beta: float = 0.5
    """β of the JSD."""
    clip: float | None = None
    """Upper bound of each vocabulary entry's contribution."""
    support: Literal["full", "given", "student_top_k"] = "full"
    """The tokens of the sum. `given`: the `top_ids` of the scores. The other two need their `hidden`."""
    k: int = 0
    """The k of student_top_k."""
    tail: bool = True
    """With `given` and `student_top_k`: count all other tokens as one more entry; False: renormalise over the K tokens
    of the support."""
    blend: float | None = None
    """TAID: the teacher's logits become (1 − blend) · student + blend · teacher, detached."""
    ratio_cap: float | None = None
    """Weight tokens by `losses.token_ratios` with this cap; None: weight 1."""
    scores: str = "teacher"
    """The entry of `Batch.scores` that the student is compared with."""
    term: str = "kd"
    """The entry of `Batch.loss_weights` that the sum uses."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the forward pass of an update must return."""

    temperature: float
    """The rollout temperature. Logits are divided by it for `logprobs` and `entropy`."""
    entropy: bool = False
    comparison: DivergenceSpec | None = None
    policy_gradient: bool = True
    """Whether the loss has a gradient through `logprobs` or `entropy`. Where it has none, and a divergence needs the
    same logits, they are by-products of it."""

    @property
    def at_once(self) -> bool:
        """Whether log-probs and entropies are computed together with the divergence."""
        comparison = self.comparison
        return (
            comparison is not None
            and not self.policy_gradient
            and comparison.support == "full"
            and comparison.temperature == self.temperature
            and comparison.ratio_cap is None  # the ratio is a function of the log-probs, and is known before
        )


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """Per-token results of one forward pass. Column t is about token t given the tokens before it; column 0 is 0."""

    logprobs: Tensor  # [B, T] fp32
    entropy: Tensor | None = None  # [B, T] fp32
    divergence: Tensor | None = None
    """Scalar Σ divergence · ratio · weight of its term, with gradient. It is summed in the forward pass, chunk by
    chunk. The ratio is that of `DivergenceSpec.ratio_cap`, or 1."""
    token_divergence: Tensor | None = None  # [B, T] fp32 without gradient; 0 where the weight is 0


@dataclass(frozen=True)
class ByProducts:
    """Where `teacher_divergence` puts the student's log-probs and entropies of the tokens that it computes."""

    logprobs: Tensor  # [B, T] fp32
    entropy: Tensor  # [B, T] fp32
    known: Tensor  # [B, T] bool, which of them are there

    @classmethod
    def of(cls, batch: Batch) -> ByProducts:
        """Nothing known yet."""
        zeros = torch.zeros_like(batch.advantages, dtype=torch.float32)
        return cls(zeros, zeros.clone(), torch.zeros_like(batch.completion_mask))


def token_logprobs(
    hidden: Tensor,
    head: nn.Linear | OutputLayer,
    input_ids: Tensor,
    *,
    temperature: float,
    config: PreTrainedConfig,
    mask: Tensor | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z / temperature) at the given tokens, and the entropy of that distribution.

    Args:
        hidden: [B, T, H], last hidden states of the tokens `input_ids`.
        head: the output layer, weight [V, H]. The softmax is over its rows.
        input_ids: [B, T].
        temperature: > 0.
        mask: [B, T] bool, the tokens that are needed; only their states are projected. None: all.

    Returns: (log-probs [B, T] fp32, entropy [B, T] fp32 or None). Column t: token t given tokens < t; column 0: 0, as
        are tokens outside the mask.
    """
    # Imported here because the package is slow to import, and a config error should be reported without that delay.
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows, columns, width = hidden.shape
    scale, softcap = logit_transform(config)
    if mask is None:
        flat, targets = hidden[:, :-1].reshape(-1, width), input_ids[:, 1:].reshape(-1)
    else:
        chosen = mask[:, 1:].nonzero(as_tuple=True)
        flat, targets = hidden[:, :-1][chosen], input_ids[:, 1:][chosen]
    if isinstance(head, OutputLayer) and head.fp32:
        flat = flat.float()  # the kernel computes in the dtype of the states, and converts the weight tile by tile
    outputs = ("entropy",) if entropy else ()
    chunk = min(VOCABULARY_CHUNK["cuda" if hidden.is_cuda else "cpu"], head.weight.shape[0])
    result = ChunkedLogProbFunction.apply(
        flat, head.weight, head.bias, targets, temperature, chunk, softcap, scale, outputs
    )

    def aligned(values: Tensor) -> Tensor:
        if mask is None:
            placed = values.view(rows, columns - 1)
        else:
            placed = values.new_zeros(rows, columns - 1).index_put(chosen, values)
        return torch.nn.functional.pad(placed, (1, 0))

    return aligned(result[0]), aligned(result[1]) if entropy else None


def teacher_divergence(
    hidden: Tensor,
    head: nn.Linear | OutputLayer,
    batch: Batch,
    comparison: DivergenceSpec,
    config: PreTrainedConfig,
    ratios: Tensor | None = None,
    by_products: ByProducts | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ divergence · ratio · weight of `comparison.term`, and the divergence of every token with a non-zero weight.

    Only those tokens are computed, in chunks. If the output layers differ in width (padded embeddings; the tokenizers
    are the same), they are compared on the columns that both have.

    Args:
        hidden: [B, T, H], last hidden states of the tokens `batch.input_ids`.
        head: the student's output layer, weight [V, H].
        ratios: [B, T], detached, a factor on the weight of each token; None: 1.
        by_products: filled in where the divergence is over the student's whole vocabulary and computed by formula.

    Returns: (scalar with gradient, [B, T] fp32 without). Column t: token t given tokens < t.
    """
    scores, of_term = batch.scores[comparison.scores], batch.loss_weights[comparison.term]
    assert scores.index is not None
    weights = of_term if ratios is None else of_term * ratios
    total = hidden.new_zeros((), dtype=torch.float32)
    per_token = torch.zeros_like(of_term)
    teachers = range(max(1, len(scores.layers)))
    for teacher in teachers:
        of_teacher = scores.index == teacher if len(teachers) > 1 else torch.ones_like(scores.index) > 0
        row, column = ((of_term != 0) & of_teacher[:, None]).nonzero(as_tuple=True)
        width = head.weight.shape[0]
        if comparison.support != "given":
            width = min(width, scores.layers[teacher].weight.shape[0])
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if width < len(weight):  # only if needed: the gradient of a slice takes another tensor of the layer's size
            weight, bias = weight[:width], None if bias is None else bias[:width]
        noted = by_products if width == head.weight.shape[0] else None
        measure = _measure(batch, comparison, teacher, row, column, bias, width, logit_transform(config), noted)
        part, found = ChunkedSum.apply(  # type: ignore[no-untyped-call]
            hidden[row, column - 1],
            weight,
            bias,
            weights[row, column],
            measure,
            _tokens_at_a_time(width, hidden.device),
        )
        total = total + part
        per_token[row, column] = found
    return total, per_token


def _tokens_at_a_time(width: int, device: torch.device) -> int:
    """Tokens in a chunk; multiples of 32 are faster, because rows fill the vector registers.

    On a GPU a chunk takes up to a quarter of the memory that is free there.
    """
    logits = CHUNK_LOGITS
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps these for us
        logits = min(max(logits, free // 4 // BYTES_PER_LOGIT), GPU_CHUNK_LOGITS)
    tokens = max(1, logits // width)
    return tokens if tokens < 64 else math.ceil(tokens / 32) * 32


def _measure(
    batch: Batch,
    comparison: DivergenceSpec,
    teacher: int,
    row: Tensor,
    column: Tensor,
    bias: Tensor | None,
    width: int,
    transform: tuple[float, float | None],
    by_products: ByProducts | None,
) -> Measure:
    """How the divergences of a chunk of the tokens (row, column) are computed: by formula or by autograd."""
    scores, (scale, softcap) = batch.scores[comparison.scores], transform

    def picked(vectors: Tensor, chunk: slice) -> Tensor:
        """The vectors [n, …] of a chunk of tokens, copied to the student's device."""
        return vectors[row[chunk].to(vectors.device), column[chunk].to(vectors.device)].to(row.device)

    def note(chunk: slice, logprobs: Tensor, entropy: Tensor) -> None:
        assert by_products is not None
        places = row[chunk], column[chunk]
        by_products.logprobs[places], by_products.entropy[places] = logprobs.float(), entropy.float()
        by_products.known[places] = True

    if comparison.support == "full" and _all_finite(bias, scores.layers[teacher].bias):
        states = scores.hidden
        assert states is not None
        return ByFormula(
            teacher=scores.layers[teacher],
            states=lambda chunk: picked(states, chunk),
            scale=scale,
            softcap=softcap,
            temperature=comparison.temperature,
            kind=comparison.kind,
            beta=comparison.beta,
            clip=comparison.clip,
            blend=comparison.blend,
            targets=lambda chunk: batch.input_ids[row[chunk], column[chunk]],
            note=None if by_products is None else note,
        )
    against = _against(scores, comparison, teacher, picked, width)
    return by_autograd(lambda raw, chunk: against(shaped(raw, scale, softcap), chunk))


def _all_finite(*biases: Tensor | None) -> bool:
    """Whether no model rules out tokens by a bias of −∞, for which the formulas would compute ∞ − ∞ or 0 · ∞."""
    return all(bias is None or bool(bias.isfinite().all()) for bias in biases)


def _against(
    scores: BatchScores,
    comparison: DivergenceSpec,
    teacher: int,
    picked: Callable[[Tensor, slice], Tensor],
    width: int,
) -> Callable[[Tensor, slice], Tensor]:
    """A function (student logits [n, width] of a chunk of tokens, the chunk) → their divergences [n]."""
    kind, beta, clip, temperature = comparison.kind, comparison.beta, comparison.clip, comparison.temperature
    assert comparison.blend is None or comparison.support != "given", "a blend needs the teacher's logits"

    def by_given_tokens(logits: Tensor, chunk: slice) -> Tensor:
        assert scores.top_ids is not None and scores.top_logprobs is not None
        ids = picked(scores.top_ids, chunk)
        log_t = picked(scores.top_logprobs, chunk).to(logits.dtype)
        absent = (ids < 0) | (ids >= width)  # fewer than k tokens were returned, or a padding row
        log_t = (append_tail if comparison.tail else renormalised)(log_t.masked_fill(absent, -torch.inf))
        log_s = restrict_to((logits / temperature).log_softmax(-1), ids, comparison.tail)
        return divergence(log_s, log_t, kind, beta, clip)

    def by_hidden_states(logits: Tensor, chunk: slice) -> Tensor:
        assert scores.hidden is not None
        teacher_logits = scores.layers[teacher].logits(picked(scores.hidden, chunk), width)
        teacher_logits = teacher_logits.to(logits.dtype)
        if comparison.blend is not None:
            teacher_logits = torch.lerp(logits.detach(), teacher_logits, comparison.blend)
        log_s, log_t = (logits / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1)
        if comparison.support == "student_top_k":
            ids = log_s.detach().topk(min(comparison.k, width), dim=-1).indices
            log_s, log_t = restrict_to(log_s, ids, comparison.tail), restrict_to(log_t, ids, comparison.tail)
        return divergence(log_s, log_t, kind, beta, clip)

    return by_given_tokens if comparison.support == "given" else by_hidden_states
