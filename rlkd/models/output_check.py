"""Whether a loaded model is one whose log-probs rlkd computes rightly; what it is not is refused at the start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlkd.distributed import RunStopped
from rlkd.losses.lm_head import logit_transform, shaped

BOUND = 1e-3
"""Nats that two log-probs of the same token may differ by in fp32."""
_TOKENS = 8


@torch.no_grad()
def check_output(hf: PreTrainedModel, path: str) -> None:
    """Send a few tokens through the model's own `logits`, and through what trainer, sampler and local teacher compute:
    the trunk's last hidden state, the output layer, and the scale and soft cap that its config names.

    The second row differs from the first in its last token alone, which must not change what was said before it: a
    model that looks ahead is no causal one, whatever its head is called. That both ways run the trunk anew shows
    dropout, or any other noise, that is left in it.

    Args:
        hf: in evaluation mode.
        path: for the message.

    Raises: RunStopped, one line, where the two differ or cannot be computed.
    """

    def refuse(why: str, cause: Exception | None = None) -> RunStopped:
        stopped = RunStopped(
            f"{path}: rlkd computes log-probs from the trunk's last hidden state and the output layer, which is not "
            f"what {type(hf).__name__} does: {' '.join(why.split())[:300]}; use a model of another architecture "
            "(a teacher of this one can be served: teacher.backend: served)"
        )
        stopped.__cause__ = cause
        return stopped

    with _runs_anywhere(hf):
        try:
            ids = _tokens(hf)
            own = hf(input_ids=ids, use_cache=False).logits
            hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head: Any = hf.get_output_embeddings()
            scale, softcap = logit_transform(hf.config)
            raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
        except Exception as error:  # whatever an unknown architecture answers, the user is told
            raise refuse(f"{type(error).__name__}: {error}", error) from error
    # In the model's type, as its own forward shapes them, so that both round alike.
    ours = shaped(raw, scale, softcap, at_least=raw.dtype)
    if own.shape != ours.shape:
        raise refuse(f"its logits have the shape {tuple(own.shape)}, ours {tuple(ours.shape)}")
    # Both come from the same trunk and the same product, so they are equal but for the rounding of what is done to the
    # logits afterwards: half a spacing (eps / 2, relative) each, of a logit and of the sum that it is compared with.
    # In fp32 that is nothing beside BOUND; in bf16 a logit of 20 has a spacing of 0.125.
    bound = BOUND + 2 * torch.finfo(own.dtype).eps * float(own.nan_to_num(0.0, 0.0, 0.0).abs().max())
    gap = _gap(own, ours)
    if not gap <= bound:
        raise refuse(f"log-probs of its own logits and ours differ by up to {gap:.2g} nats, {bound:.2g} are allowed")
    ahead = _gap(ours[0, :-1], ours[1, :-1])
    if not ahead <= bound:
        raise refuse(f"another last token changes log-probs before it by up to {ahead:.2g} nats: it is not causal")


def _tokens(hf: PreTrainedModel) -> Tensor:
    """[2, _TOKENS]: two rows that differ in the last token, spread over the vocabulary."""
    embeddings: Any = hf.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    first = torch.arange(1, _TOKENS + 1) * (vocabulary - 1) // (_TOKENS + 1)
    second = first.clone()
    second[-1] = first[0]
    return torch.stack([first, second]).to(hf.device)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of two log-softmaxes; NaN where one is."""
    a, b = a.float().log_softmax(-1), b.float().log_softmax(-1)
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())  # −inf, of a token that is masked out, equals itself


@contextmanager
def _runs_anywhere(hf: PreTrainedModel) -> Iterator[None]:
    """Inside, attention runs on any device and in any type: flash attention would want a GPU and half precision.

    The model has just been loaded on the CPU, and which attention is used is no matter of the output layer.
    """
    chosen = hf.config._attn_implementation
    if chosen in (None, "eager", "sdpa"):
        yield
        return
    hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf.set_attn_implementation(chosen)
