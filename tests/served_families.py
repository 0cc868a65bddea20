"""Tiny models of families whose weights transformers renames, fuses or ties."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel
from vllm_fixtures import EOS, MAX_LEN, VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=False),
    "qwen3_tied": lambda: hf.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32, tie_word_embeddings=False),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4, tie_word_embeddings=False),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "granite_moe": lambda: hf.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "phi_moe": lambda: hf.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **SIZES, **EXPERTS, head_dim=32, shared_expert_intermediate_size=32, layer_types=["full_attention"] * 2
    ),
    "glm4_moe": lambda: hf.Glm4MoeConfig(
        **SIZES,
        head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
}


@torch.no_grad()
def trained(model: PreTrainedModel, seed: int) -> None:
    """Move every weight by about a third of its size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += 0.3 * parameter.square().mean().sqrt().clamp(min=0.1) * noise
