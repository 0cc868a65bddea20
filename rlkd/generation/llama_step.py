"""A decoding step of a Llama, with fewer calls than the modules of transformers make for it.

For a small model on the CPU these calls take much of a step's time. The operations and their order are the same, so the
numbers are; `check_decode` holds them to the modules' forward pass at the start of a run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

_KNOWN = (
    LlamaModel,
    LlamaDecoderLayer,
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    nn.Linear,
    nn.Embedding,
    nn.ModuleList,
    nn.SiLU,
    SiLUActivation,
)
"""The modules whose computation `LlamaStep` knows."""


def llama_step(hf: PreTrainedModel) -> LlamaStep | None:
    """A step for `hf`; None unless it is a Llama in fp32, with SDPA, of unchanged modules.

    In half precision the modules round between operations that are one here.
    """
    trunk: Any = hf.base_model
    plain = (
        type(trunk) is LlamaModel
        and hf.dtype == torch.float32
        and hf.config._attn_implementation == "sdpa"
        and all(type(module) in _KNOWN for module in trunk.modules())
    )
    return LlamaStep(trunk) if plain else None


class LlamaStep:
    """Reads one token per row. It uses the model's parameters, so it follows them when they change."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache) -> Tensor:
        """
        Args:
            input_ids, position_ids: [B, 1].
            mask: [B, T], 0 for padding, of all that the rows have read, these tokens included.
            cache: what the rows have read; gets these tokens' keys and values.

        Returns: the last hidden states, [B, H].
        """
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, -torch.inf)[:, None, None]
        states = self.model.embed_tokens(input_ids.squeeze(1))
        cos, sin = self.model.rotary_emb(states, position_ids=position_ids)  # [B, 1, dim]
        for layer in self.model.layers:
            block = layer.self_attn
            read = _attention(block, _normed(layer.input_layernorm, states), cos, sin, bias, cache)
            states = states + _linear(block.o_proj, read)
            inner = _gated(layer.mlp, _normed(layer.post_attention_layernorm, states))
            states = states + _linear(layer.mlp.down_proj, inner)
        return _normed(self.model.norm, states)


def _normed(norm: LlamaRMSNorm, states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)


def _linear(linear: nn.Linear, states: Tensor) -> Tensor:
    return F.linear(states, linear.weight, linear.bias)


def _gated(mlp: Any, states: Tensor) -> Tensor:
    """The MLP without its last layer: [B, H] → [B, width]."""
    return F.silu(_linear(mlp.gate_proj, states), inplace=True).mul_(_linear(mlp.up_proj, states))


def _attention(block: Any, states: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, cache: DynamicCache) -> Tensor:
    """Attention without its last layer: [B, H] → [B, heads · dim].

    Args:
        cos, sin: [B, 1, dim].
        bias: [B, 1, 1, T], added to the scores.
    """
    rows, groups = len(states), block.num_key_value_groups
    both = torch.cat((_linear(block.q_proj, states), _linear(block.k_proj, states)), dim=1)
    turned = _turned(both.view(rows, -1, block.head_dim), cos, sin)
    values = _linear(block.v_proj, states).view(rows, -1, 1, block.head_dim)
    heads = values.shape[1]
    keys, values = cache.update(turned[:, heads * groups :, None], values, block.layer_idx)
    # The heads that share keys and values stand beside each other, like several tokens of one head: nothing is copied.
    queries = turned[:, : heads * groups].unflatten(1, (heads, groups))
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=block.scaling)
    return read.reshape(rows, -1)


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, dim]: states · cos + (−second half, first half) · sin.

    In this order it is rounded as the modules round it.
    """
    first, second = states.chunk(2, dim=-1)
    first_sin, second_sin = sin.chunk(2, dim=-1)
    turned = states * cos
    half = first.shape[-1]
    turned[..., :half].sub_(second * first_sin)
    turned[..., half:].add_(first * second_sin)
    return turned
