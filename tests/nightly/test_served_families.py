"""Weights reach a vLLM server whole, also where transformers has renamed or fused them on loading.

pytest tests/nightly/test_served_families.py -s            one dense model and one mixture of experts, with figures
pytest tests/nightly/test_served_families.py -s --soak     all
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from test_weight_sync import mismatch, opened
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from vllm_fixtures import EOS, MAX_LEN, VOCABULARY, save_model, start_server

from rlkd.distributed import RunStopped
from rlkd.models.student import Student, load_causal_lm

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

SERVED = ("mixtral", "qwen3_tied", "llama", "qwen3_moe")
"""By a server of their own; without --soak the first alone, since one takes half a minute to start."""


@torch.no_grad()
def trained(model: PreTrainedModel, seed: int) -> None:
    """Move every weight by about a third of its size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += 0.3 * parameter.square().mean().sqrt().clamp(min=0.1) * noise


@pytest.mark.server
@pytest.mark.parametrize("family", SERVED)
def test_three_updates_of_every_weight_are_served(family: str, soak: bool, tmp_path: Path) -> None:
    if family != SERVED[0] and not soak:
        pytest.skip("with --soak")
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    path = save_model(start, tmp_path / "model")
    student = Student(load_causal_lm(path, torch.float32, attention=None, trust_remote_code=False), VOCABULARY)
    server = start_server(family.replace("_", "-"), path, tmp_path)
    try:
        server.wait_ready()
        sampler = opened(path, server)
        for version in (1, 2, 3):
            before = mismatch(sampler, student.hf, version - 1) if version > 1 else 0.0
            trained(student.hf, version)
            sampler.publish(student.loader_weights(student.full_weights()), version)
            after = mismatch(sampler, student.hf, version)
            print(f"{family}, update {version}: mismatch/max {after:.1e}", flush=True)
            assert after < 1e-4
            assert before < 1e-4
        assert mismatch(sampler, start, 3) > 1.0, "else this test could not see old weights"
        weights = student.loader_weights(student.full_weights())
        expert = next((name for name in weights if ".experts.1." in name), None)
        if expert is not None:
            with pytest.raises(RunStopped, match="a weight update failed"):
                sampler.publish({name: value for name, value in weights.items() if name != expert}, 4)
            assert "lacks some of the weights of 1 layers, e.g. model.layers.0." in server.log.read_text()
            sampler.publish(weights, 5)
            assert mismatch(sampler, student.hf, 5) < 1e-4
        sampler.close()
    finally:
        server.stop()
