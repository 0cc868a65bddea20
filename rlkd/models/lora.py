"""LoRA (arXiv 2106.09685) through PEFT: small trained matrices added to the student's frozen linear layers.

`layers` decides which layers are adapted, and PEFT is given their full names. In some mixtures of experts PEFT would
also adapt the fused experts and the router for "all-linear" and for names such as up_proj.

An adapted layer computes W x + (alpha / r) · B A x. W stays as it was loaded; A (random) and B (initially zero) are
trained, in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlkd.builtin import resolve
from rlkd.config.schema import LoraConfig, ModelConfig

NAME = "default"
"""PEFT's default name of an adapter; it is part of the parameter names."""


FILE = "adapter_model.safetensors"
"""PEFT's file name for adapter weights; `adapter_config.json` is in the same folder."""


def inject(hf: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Add adapters to `hf` in place and freeze everything else. They depend on `seed`, so all ranks get the same.

    Raises: ValueError, see `layers`.
    """
    import peft  # imported here because it is slow to import and most runs do not need it

    targets = layers(hf, lora)
    with torch.random.fork_rng(devices=[]), _adapters_on_the_cpu(hf, targets):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_settings(lora, targets, None), hf, NAME)


@contextmanager
def _adapters_on_the_cpu(hf: PreTrainedModel, targets: list[str]) -> Iterator[None]:
    """Let PEFT initialise the adapters of layers whose weights are still on the meta device.

    PEFT moves an adapter to the device of its layer's weight, which must therefore be on the CPU. A single number there
    stands for each weight meanwhile, expanded to its shape.
    """
    kept: list[tuple[nn.Module, nn.Parameter]] = []
    for layer in map(hf.get_submodule, targets):
        weight: Any = layer.weight
        if weight.is_meta:
            kept.append((layer, weight))
            layer.weight = nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    yield
    for layer, weight in kept:
        layer.weight = weight.requires_grad_(False)


def _settings(lora: LoraConfig, targets: list[str], base: str | None) -> Any:
    """The same settings as a PEFT config."""
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

    "all-linear" means every `nn.Linear` except the output layer, which cannot be adapted because the log-prob kernels
    use its weight and not its forward. Other modules get no adapters: embeddings, fused experts (one tensor for all
    experts) and routers, including subclasses of `nn.Linear` that compute something else. Layers whose names PEFT
    takes for fused experts (`_taken_for_experts`) get none either, since loading the adapter would adapt other layers.

    Raises: ValueError, one line, if a name in `model.lora.target_modules` matches no such layer of `hf`. PEFT itself
        ignores a name that matches nothing, as long as another one does.
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
        raise ValueError(f"model.lora: {type(hf).__name__} has no linear layers except the output layer")
    if lora.target_modules == "all-linear":
        return linear
    chosen = set()
    for target in lora.target_modules:
        named = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not named:
            why = f" ({_last(target)} is PEFT's name for the fused experts)" if _last(target) in taken else ""
            raise ValueError(
                f"model.lora.target_modules: {target!r} is not a linear layer of {type(hf).__name__} that can be "
                f"adapted{why}; use some of {', '.join(sorted({_last(name) for name in linear}))}"
            )
        chosen.update(named)
    return [name for name in linear if name in chosen]


def layer_names(hf: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The last parts of the names of the layers that get adapters: q_proj, up_proj … Raises: see `layers`."""
    return sorted({_last(name) for name in layers(hf, lora)})


def unadapted(hf: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The matrices in the repeated layers that have no adapter and stay frozen: mlp.experts.down_proj, mlp.gate …

    The names omit the numbers of layers and experts. Raises: see `layers`.
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
    """Whether PEFT adapts the fused experts or the router of `hf` when it is asked for layers called `name`.

    For the sake of older adapters, PEFT keeps the meaning that names had before transformers fused the experts.
    """
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    settings = peft.LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(settings, hf, None)
    except ValueError:  # only one of the two names that now share a fused tensor
        return True
    return bool(settings.target_parameters)


def skeleton(model: ModelConfig) -> PreTrainedModel:
    """The student's layers without weights."""
    settings = AutoConfig.from_pretrained(resolve(model.path), trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        hf: PreTrainedModel = AutoModelForCausalLM.from_config(settings, trust_remote_code=model.trust_remote_code)
    return hf


def set_scale(hf: PreTrainedModel, factor: float) -> None:
    """Multiply the adapters' contribution by `factor`; with 0 the model is exactly the one that was loaded."""
    from peft.tuners.lora import LoraLayer

    for module in hf.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(NAME, factor)


def is_adapter(name: str) -> bool:
    """Whether the parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merged(weights: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """The weights of an equivalent model without adapters: W + (alpha / r) · B A.

    Args:
        weights: full, unsharded weights of the model with adapters.

    Returns: the weights under plain Hugging Face names.
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
    """The adapter weights in `weights` (full, of the model with adapters) under the names of PEFT's files."""
    return {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": value
        for name, value in weights.items()
        if is_adapter(name)
    }


def write(adapter: Mapping[str, Tensor], lora: LoraConfig, base: str, folder: Path) -> None:
    """Write an adapter in PEFT's format to `folder`, which must exist.

    Args:
        adapter: full tensors under the names of PEFT's files (`Student.adapter_weights`).
        base: folder or hub id of the model that the adapter belongs to.
    """
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    adapted = [name.removeprefix(prefix).removesuffix(suffix) for name in adapter if name.endswith(suffix)]
    _settings(lora, adapted, base).save_pretrained(folder)
    save_file({name: value.detach().cpu().contiguous() for name, value in adapter.items()}, folder / FILE)
