"""LoRA (arXiv 2106.09685) through PEFT: small trained matrices beside the student's frozen linear layers.

An adapted layer computes W x + (alpha / r) · B A x. W stays as it was loaded; A (random) and B (zero at the start) are
trained, in fp32.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlkd import whole
from rlkd.config import LoraConfig, ModelConfig
from rlkd.tiny import resolve

NAME = "default"
"""What PEFT calls an adapter that has no other name; part of the names of its parameters."""


FILE = "adapter_model.safetensors"
"""PEFT's name for the weights of an adapter; `adapter_config.json` stands beside it."""


def inject(hf: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Give `hf` adapters, in place, and freeze all else. The same ones on every rank: a function of `seed`.

    Raises: ValueError as `layer_names`.
    """
    import peft  # late: slow to import, and most runs have no use for it

    layer_names(hf, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_settings(lora, lora.target_modules, None), hf, NAME)


def _settings(lora: LoraConfig, targets: str | list[str], base: str | None) -> Any:
    """PEFT's own."""
    import peft

    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def layer_names(hf: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The last parts of the names of the layers that get adapters: q_proj, up_proj …

    Raises: ValueError, one line, when `model.lora.target_modules` names what is no linear layer of `hf`. PEFT itself
        passes over a name that matches nothing, as long as another one does. The output layer cannot be adapted: the
        log-prob kernels read its weight, not its forward.
    """
    head = hf.get_output_embeddings()
    linear = [name for name, module in hf.named_modules() if isinstance(module, nn.Linear) and module is not head]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if not linear:
        raise ValueError(f"model.lora: {type(hf).__name__} has no linear layers beside the output layer")
    if lora.target_modules == "all-linear":
        return known
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ValueError(
                f"model.lora.target_modules: {target!r} is no linear layer of {type(hf).__name__} that can be adapted; "
                f"it has {', '.join(known)}"
            )
    return sorted({target.rsplit(".", 1)[-1] for target in lora.target_modules})


def skeleton(model: ModelConfig) -> PreTrainedModel:
    """The student's layers without weights."""
    settings = AutoConfig.from_pretrained(resolve(model.path), trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        hf: PreTrainedModel = AutoModelForCausalLM.from_config(settings, trust_remote_code=model.trust_remote_code)
    return hf


def set_scale(hf: PreTrainedModel, factor: float) -> None:
    """Count the adapters `factor` times from now on; with 0 the model is exactly the one that it was loaded as."""
    from peft.tuners.lora import LoraLayer

    for module in hf.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(NAME, factor)


def is_adapter(name: str) -> bool:
    """Whether the parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merged(weights: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same: W + (alpha / r) · B A.

    Args:
        weights: full, unsharded, of the model with adapters.

    Returns: them under plain Hugging Face names.
    """
    plain: dict[str, Tensor] = {}
    for name, value in weights.items():
        if is_adapter(name):
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            down, up = weights[f"{layer}lora_A.{NAME}.weight"], weights[f"{layer}lora_B.{NAME}.weight"]
            value = value + lora.alpha / lora.r * (up @ down)
        plain[name.replace(".base_layer.", ".")] = value
    return plain


def peft_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters among `weights` (full, of the model with adapters) under the names of PEFT's files."""
    return {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": value
        for name, value in weights.items()
        if is_adapter(name)
    }


def write(adapter: Mapping[str, Tensor], lora: LoraConfig, base: str, folder: Path) -> None:
    """Write an adapter in PEFT's form to `folder`, whole or not at all; it is replaced when it exists.

    Args:
        adapter: full tensors under the names of PEFT's files (`Student.adapter_weights`).
        base: folder or hub id of the model that the adapter belongs to.
    """
    beside = whole.partial(folder)
    shutil.rmtree(beside, ignore_errors=True)
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    layers = [name.removeprefix(prefix).removesuffix(suffix) for name in adapter if name.endswith(suffix)]
    _settings(lora, layers, base).save_pretrained(beside)
    save_file({name: value.detach().cpu().contiguous() for name, value in adapter.items()}, beside / FILE)
    whole.remove(folder)
    beside.rename(folder)
