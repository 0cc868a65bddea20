"""Tiny random models of the decoder families of transformers, written to folders as real ones are."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlkd.builtin import resolve

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 97
LARGEST = 8_000_000
"""The largest number of parameters that still counts as tiny."""

_SMALL = {
    name: value
    for names, value in (
        ("vocab_size vocab_size_per_layer_input ngram_vocab_size_base", VOCABULARY),
        ("hidden_size d_model n_embd embedding_size emb_dim dim word_embed_proj_dim", 32),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers", 4),
        ("num_encoder_layers num_decoder_layers", 4),
        ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
        ("num_encoder_attention_heads num_decoder_attention_heads", 4),
        ("num_key_value_heads num_kv_heads kv_n_heads", 2),
        ("head_dim attention_head_size qk_nope_head_dim v_head_dim qk_rope_head_dim", 8),
        ("intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim n_inner d_inner dim_ff", 48),
        ("moe_intermediate_size ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size", 48),
        ("moe_shared_expert_intermediate_size expert_ffn_hidden_size", 48),
        ("num_local_experts num_experts n_routed_experts moe_num_experts n_experts", 4),
        ("num_experts_per_tok moe_topk top_k moe_k num_selected_experts moe_top_k", 2),
        ("max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length", 128),
        ("kv_lora_rank q_lora_rank", 16),
        ("linear_num_key_heads linear_num_value_heads", 4),
        ("linear_key_head_dim linear_value_head_dim index_head_dim hidden_size_per_layer_input", 8),
        ("n_group topk_group num_expert_group", 1),
        ("depth out_hidden_size patch_size image_size", 16),
        ("sliding_window window_size", 8),
        ("pad_token_id bos_token_id eos_token_id sep_token_id", 1),
    )
    for name in names.split()
}
_HYBRID = ["linear_attention", "full_attention"] * 2
_EXCEPTIONS: dict[str, dict] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "diffllama": {"attention_dropout": 0.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {
        "lm_head_multiplier": 0.4,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 4.0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "hyperclovax": {"logits_scaling": 0.3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "kimi_linear": {"layer_types": _HYBRID, "num_experts_per_token": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_d_state": 16},
}
"""Additional settings that some families need."""


def tiny_config(family: str, dropout: float = 0.0):
    """A small config of `family`, with `dropout` wherever it has a rate."""
    return AutoConfig.for_model(
        family, **(_shrunk(AutoConfig.for_model(family), dropout) | _EXCEPTIONS.get(family, {}))
    )


def _shrunk(config, dropout: float) -> dict:
    known = vars(config)
    changed: dict = {}
    for name, value in config.to_dict().items():
        inner = known.get(name)
        if isinstance(inner, PreTrainedConfig):
            changed[name] = _shrunk(inner, dropout)
        elif name == "is_decoder":
            changed[name] = True
        elif "drop" in name and type(value) is float:
            changed[name] = dropout
        elif type(value) is int and value > _SMALL.get(name, value):
            changed[name] = _SMALL[name]
    if "kv_lora_rank" in known and "num_key_value_heads" in known:  # latent attention has as many as it has heads
        changed["num_key_value_heads"] = 4
    return changed


def write(family: str, folder, dropout: float = 0.0) -> None:
    """Write a tiny random model of `family`, with `dropout`, and the built-in student's tokenizer.

    Weights have a larger spread than at initialisation, so that a wrong mask, position or scale shows.

    Raises: anything that the family raises on its config; AssertionError if it is not tiny.
    """
    config = tiny_config(family, dropout)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size <= LARGEST, f"{size:,} parameters"
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    hf.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(Path(resolve("builtin:student"), file), folder)
