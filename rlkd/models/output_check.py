"""Checks at the start that rlkd computes the log-probs of a loaded model correctly, and rejects other models."""

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
"""Largest allowed difference, in nats, between two log-probs of the same token in fp32."""
_TOKENS = 8


@torch.no_grad()
def check_output(hf: PreTrainedModel, path: str) -> None:
    """Compare the model's own `logits` for a few tokens with what trainer, sampler and local teacher compute: the
    trunk's last hidden state, the output layer, and the scale and soft cap from the model's config.

    The two input rows differ only in the last token, which must not change the logits before it; if it does, the model
    is not causal. Each side runs the trunk again, so dropout or any other remaining noise shows as a difference.

    Args:
        hf: the model, in evaluation mode.
        path: the model's path, for the error message.

    Raises: RunStopped, one line, if the two differ or cannot be computed.
    """

    def refuse(why: str, cause: Exception | None = None) -> RunStopped:
        stopped = RunStopped(
            f"{path}: rlkd computes log-probs from the trunk's last hidden state and the output layer, which is not "
            f"what {type(hf).__name__} does: {' '.join(why.split())[:300]}; use a model of another architecture "
            "(a teacher of this architecture can be served: teacher.backend: served)"
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
        except Exception as error:  # an unknown architecture can raise any type; report it to the user
            raise refuse(f"{type(error).__name__}: {error}", error) from error
    # In the model's dtype, like its own forward, so that both are rounded in the same way.
    ours = shaped(raw, scale, softcap, at_least=raw.dtype)
    if own.shape != ours.shape:
        raise refuse(f"its logits have the shape {tuple(own.shape)}, ours {tuple(ours.shape)}")
    # Both come from the same trunk and the same product, so they differ only by the rounding of later operations on
    # the logits: half a spacing (eps / 2, relative) each, for a logit and for the sum that it is compared with.
    # In fp32 that is negligible against BOUND; in bf16 a logit of 20 has a spacing of 0.125.
    bound = BOUND + 2 * torch.finfo(own.dtype).eps * float(own.nan_to_num(0.0, 0.0, 0.0).abs().max())
    gap = _gap(own, ours)
    if not gap <= bound:
        raise refuse(f"log-probs from its own logits and ours differ by up to {gap:.2g} nats; {bound:.2g} are allowed")
    ahead = _gap(ours[0, :-1], ours[1, :-1])
    if not ahead <= bound:
        raise refuse(f"changing the last token changes earlier log-probs by up to {ahead:.2g} nats: it is not causal")


def _tokens(hf: PreTrainedModel) -> Tensor:
    """[2, _TOKENS] token ids spread over the vocabulary; the two rows differ in the last token."""
    embeddings: Any = hf.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    first = torch.arange(1, _TOKENS + 1) * (vocabulary - 1) // (_TOKENS + 1)
    second = first.clone()
    second[-1] = first[0]
    return torch.stack([first, second]).to(hf.device)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference between two log-softmaxes; NaN if either contains a NaN."""
    a, b = a.float().log_softmax(-1), b.float().log_softmax(-1)
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())  # −inf of a masked token counts as equal to −inf


@contextmanager
def _runs_anywhere(hf: PreTrainedModel) -> Iterator[None]:
    """Use an attention that runs on any device and in any dtype; flash attention needs a GPU and half precision.

    The model has just been loaded on the CPU, and the check of the output layer does not depend on the attention.
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
