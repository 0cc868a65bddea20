"""LoRA (arXiv 2106.09685) through PEFT: small trained matrices beside the student's frozen linear layers.

Which layers those are is decided here, by `layers`, and PEFT is given their full names. In some mixtures of experts it
takes "all-linear", and names such as up_proj, for the fused experts and the router as well.

An adapted layer computes W x + (alpha / r) · B A x. W stays as it was loaded; A (random) and B (zero at the start) are
trained, in fp32.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlkd.builtin import resolve
from rlkd.config.schema import LoraConfig, ModelConfig
from rlkd.storage import atomic

NAME = "default"
"""What PEFT calls an adapter that has no other name; part of the names of its parameters."""


FILE = "adapter_model.safetensors"
"""PEFT's name for the weights of an adapter; `adapter_config.json` stands beside it."""


def inject(hf: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Give `hf` adapters, in place, and freeze all else. The same ones on every rank: a function of `seed`.

    Raises: ValueError as `layers`.
    """
    import peft  # late: slow to import, and most runs have no use for it

    settings = _settings(lora, layers(hf, lora), None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, hf, NAME)


def _settings(lora: LoraConfig, targets: list[str], base: str | None) -> Any:
    """PEFT's own."""
    import peft

    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def layers(hf: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The full names of the layers that get adapters: model.layers.0.self_attn.q_proj …

    All-linear is every `nn.Linear` but the output layer, which cannot be adapted: the log-prob kernels read its weight,
    not its forward. What is none has no adapter: embeddings, fused experts (one tensor for all of them) and routers,
    also those that are derived from `nn.Linear` and compute something else. Nor have layers beside fused experts whose
    names PEFT takes for the experts' (`_taken_for_experts`): whoever loads the adapter would get other layers.

    Raises: ValueError, one line, when `model.lora.target_modules` names what is no such layer of `hf`. PEFT itself
        passes over a name that matches nothing, as long as another one does.
    """
    head = hf.get_output_embeddings()
    plain = [
        name
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module is not head
    ]
    taken = {last for last in {_last(name) for name in plain} if _taken_for_experts(hf, last)}
    linear = [name for name in plain if _last(name) not in taken]
    if not linear:
        raise ValueError(f"model.lora: {type(hf).__name__} has no linear layers beside the output layer")
    if lora.target_modules == "all-linear":
        return linear
    chosen = set()
    for target in lora.target_modules:
        named = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not named:
            why = f" ({_last(target)} is PEFT's name for the fused experts)" if _last(target) in taken else ""
            raise ValueError(
                f"model.lora.target_modules: {target!r} is no linear layer of {type(hf).__name__} that can be adapted"
                f"{why}; it has {', '.join(sorted({_last(name) for name in linear}))}"
            )
        chosen.update(named)
    return [name for name in linear if name in chosen]


def layer_names(hf: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The last parts of the names of the layers that get adapters: q_proj, up_proj … Raises: as `layers`."""
    return sorted({_last(name) for name in layers(hf, lora)})


def unadapted(hf: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The matrices inside the repeated layers that have no adapter and stay frozen: mlp.experts.down_proj, mlp.gate …

    Numbers of layers and experts are left out. Raises: as `layers`.
    """
    adapted = set(layers(hf, lora))
    names = {
        name.removesuffix(".weight")
        for name, value in hf.named_parameters()
        if value.ndim > 1 and re.search(r"\.\d+\.", name)
    }
    return sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in names - adapted})


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _taken_for_experts(hf: PreTrainedModel, name: str) -> bool:
    """Whether PEFT adapts the fused experts or the router of `hf` when it is asked for layers of that name.

    It keeps the meaning that names had before transformers fused the experts, for adapters of that time.
    """
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    settings = peft.LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(settings, hf, None)
    except ValueError:  # one of two names for one fused tensor
        return True
    return bool(settings.target_parameters)


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
    beside = atomic.partial(folder)
    shutil.rmtree(beside, ignore_errors=True)
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    adapted = [name.removeprefix(prefix).removesuffix(suffix) for name in adapter if name.endswith(suffix)]
    _settings(lora, adapted, base).save_pretrained(beside)
    save_file({name: value.detach().cpu().contiguous() for name, value in adapter.items()}, beside / FILE)
    atomic.share(beside)
    atomic.remove(folder)
    beside.rename(folder)
