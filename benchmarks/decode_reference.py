"""Decoding written plainly: every row reads its prompt, and the cache copies itself in every step.

It is how rlkd decoded at first. `rlkd.generation.hf.decode` must draw the same tokens: tests compare the two, and
benchmarks/generation.py their times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlkd.losses.lm_head import OutputLayer, shaped
from rlkd.types import Completion


@torch.no_grad()
def plain_decode(
    hf: PreTrainedModel,
    vocabulary: int,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray,
    temperature: float,
    ends: Sequence[int],
    top_k: int = 0,
) -> list[Completion]:
    """See `rlkd.generation.hf.decode`."""
    device = hf.device
    input_ids, mask = left_padded(prompts)
    drawn: list[list[tuple[int, float]]] = [[] for _ in prompts]
    likeliest: list[list[Tensor]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    alive = list(range(len(prompts)))
    cache = DynamicCache(config=hf.config)
    shrinks = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    eos = torch.tensor(ends, device=device)
    layer = OutputLayer.of(hf, vocabulary)
    for position in range(uniforms.shape[1]):
        trunk = hf.base_model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        hidden = trunk.last_hidden_state[:, -1]
        raw = torch.nn.functional.linear(hidden, layer.weight, layer.bias)
        logits = shaped(raw, layer.scale, layer.softcap, torch.float64)
        noise = torch.as_tensor(uniforms[alive, position], device=device)
        tokens, logprobs = plain_draw(logits, noise, temperature)
        ended = torch.isin(tokens, eos)
        if top_k:
            for row, ids in zip(alive, logits.topk(min(top_k, logits.shape[-1])).indices.cpu(), strict=True):
                if not stopped[row]:
                    likeliest[row].append(ids)
        for row, token, logprob, end in zip(alive, tokens.tolist(), logprobs.tolist(), ended.tolist(), strict=True):
            if not stopped[row]:
                drawn[row].append((token, logprob))
                stopped[row] = end
        if all(stopped):
            break
        if shrinks and bool(ended.any()):
            keep = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            tokens, mask, position_ids = tokens[keep], mask[keep], position_ids[keep]
            alive = [alive[i] for i in keep.tolist()]
        input_ids = tokens[:, None]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        position_ids = position_ids[:, -1:] + 1
    return [
        Completion(
            token_ids=tuple(token for token, _ in row),
            logprobs=tuple(logprob for _, logprob in row),
            finish_reason="stop" if end else "length",
            top_ids=torch.stack(top) if top else None,
        )
        for row, end, top in zip(drawn, stopped, likeliest, strict=True)
    ]


def plain_draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See `rlkd.generation.hf.draw`."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        cdf = logprobs.exp().cumsum(dim=-1)
        tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def left_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """([B, T] ids, [B, T] mask), padded so that the last token of every row is in the last column."""
    longest = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask
