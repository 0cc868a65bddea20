"""Random models for the GPU tests: tiny ones, and ones of the shape of real models, which a GPU makes in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from vllm_fixtures import EOS, VOCABULARY, save_tokenizer


def _qwen(**shape: object) -> Qwen2Config:
    """Models of this family have biases at their queries, keys and values."""
    filled = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": EOS, "tie_word_embeddings": True}
    return Qwen2Config(**(filled | shape), architectures=["Qwen2ForCausalLM"], dtype="bfloat16")


def qwen_05b() -> Qwen2Config:
    """Qwen2.5-0.5B's config.json, with our tokenizer's ids."""
    return _qwen(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
    )


def qwen_7b(layers: int) -> Qwen2Config:
    """Qwen2.5-7B's config.json, with our tokenizer's ids. The model itself has 28 layers."""
    return _qwen(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )


def wide_embedding() -> Qwen2Config:
    """One layer and an embedding of 1.16 GiB in bf16, more than vLLM packs into one buffer by default."""
    return _qwen(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )


def tiny_qwen(seed: int, tied: bool = True) -> Qwen2ForCausalLM:
    """Random, in fp32 on the CPU, with logits that spread over several nats and biases that matter."""
    torch.manual_seed(seed)
    config = _qwen(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


class RandomModel:
    """A folder with a random model. The small files are there at once; the weights follow when they are asked for."""

    def __init__(self, folder: Path, config: Qwen2Config) -> None:
        self.path = str(folder)
        self.config = config
        self._filled = False
        config.save_pretrained(folder)
        save_tokenizer(config.vocab_size, folder)

    def made(self, seed: int = 0) -> PreTrainedModel:
        """The model with other weights for each seed, on the GPU in bf16. Its logits spread over 2 to 3 nats."""
        torch.manual_seed(seed)
        with torch.device("cuda"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight.normal_(std=2.5 / self.config.hidden_size**0.5)
        return model

    def saved(self) -> str:
        """The path, once the weights of seed 0 are in the folder."""
        if not self._filled:
            self.made().save_pretrained(self.path)
            self._filled = True
            torch.cuda.empty_cache()
        return self.path
