"""The output layer of a language model: hidden states → logits, with the architecture's scale and soft cap."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_SCALES = {"falcon_h1": "lm_head_multiplier", "hyperclovax": "logits_scaling"}


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(scale, soft cap) that the architecture applies to its raw logits; (1, None) for most architectures.

    Raises: ValueError for an architecture that scales its logits in a way that is not implemented here.
    """
    text = config.get_text_config()
    known = text.to_dict()
    softcap = next((known[key] for key in _SOFTCAPS if known.get(key) is not None), None)
    scale = 1.0
    if known.get("logit_scale") is not None:  # Cohere
        scale = float(known["logit_scale"])
    elif known.get("logits_scaling") is not None and text.model_type.startswith("granite"):
        scale = 1.0 / float(known["logits_scaling"])
    elif text.model_type in _SCALES:
        scale = float(known[_SCALES[text.model_type]])
    elif any(known.get(key) is not None for key in ("logits_scaling", "lm_head_multiplier", "output_multiplier")):
        raise ValueError(
            f"model.path: rlkd does not implement how {text.model_type} scales its logits; use another architecture"
        )
    return scale, softcap


def shaped(logits: Tensor, scale: float, softcap: float | None, at_least: torch.dtype = torch.float32) -> Tensor:
    """Raw logits with the architecture's scale and soft cap, in a dtype of at least `at_least`'s precision."""
    logits = logits.to(torch.promote_types(logits.dtype, at_least))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def projected(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [N, H] · weightᵀ + bias: [N, V] in at least fp32, so that half-precision operands give unrounded logits.

    In bf16 a logit of 20 has a spacing of 0.125, which would be noise in a divergence between similar models.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(hidden, weight, bias)
    if weight.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().T
    return logits if bias is None else logits + bias.float()


def add_product(total: Tensor, left: Tensor, right: Tensor, half: torch.dtype | None) -> None:
    """total [A, B] += left [A, n] · right [n, B], in place, in the dtype of `total`.

    Args:
        half: on a GPU, a type to which the operands are rounded, so that tensor cores multiply them; the sums stay in
            fp32. This is how autograd computes the gradient of a layer in bf16. None, and on a CPU: not rounded.
    """
    if half == torch.bfloat16 and total.is_cuda:
        torch.addmm(total, left.to(half), right.to(half), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left, right)


WEIGHT_TILE = 2**20
"""Numbers of a weight that `project_into` converts to the type of the logits at a time: 4 MiB in fp32."""


def project_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The logits of `projected`, transposed, written into memory that is there already: weight · hiddenᵀ + bias.

    Args:
        out: [V, N], contiguous, in at least fp32. hidden: [N, H]. weight: [V, H]. bias: [V].
    """
    if weight.dtype == out.dtype:
        torch.mm(weight, hidden.T, out=out)
    elif weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        torch.mm(weight, hidden.T, out_dtype=out.dtype, out=out)
    else:
        columns, step = hidden.T.to(out.dtype), max(1, WEIGHT_TILE // weight.shape[1])
        for start in range(0, len(weight), step):
            torch.mm(weight[start : start + step].to(out.dtype), columns, out=out[start : start + step])
    if bias is not None:
        out += bias.to(out.dtype)[:, None]


def shape_in_place(logits: Tensor, scale: float, softcap: float | None) -> None:
    """`shaped`, in the memory of the raw logits."""
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


@dataclass(frozen=True, kw_only=True)
class OutputLayer:
    """The rows of a model's output layer that belong to tokens, and the scale and soft cap of its logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    fp32: bool = False
    """Whether log-probs and samples come from logits in fp32 even if the model computes in half precision."""

    @classmethod
    def of(cls, hf: PreTrainedModel, vocabulary: int, fp32: bool = False) -> OutputLayer:
        """The layer of `hf`, of which only the first `vocabulary` rows belong to tokens (vocabulary.py).

        The tensors share the model's memory and carry its gradient. If the model has padding rows they are slices, and
        the backward pass needs another tensor of the layer's size.
        """
        head = hf.get_output_embeddings()
        scale, softcap = logit_transform(hf.config)
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        assert vocabulary <= len(weight), f"{vocabulary} tokens, but the output layer has {len(weight)} rows"
        if vocabulary < len(weight):
            weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        return cls(weight=weight, bias=bias, scale=scale, softcap=softcap, fp32=fp32)

    def sampled_from(self, hidden: Tensor) -> Tensor:
        """[N, H] → [N, V] raw logits, rounded as those of the trainer's log-probs: to the model's dtype, or fp32."""
        make = projected if self.fp32 else F.linear
        return make(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor, vocabulary: int) -> Tensor:
        """[N, ≥ H] → [N, `vocabulary`]: the logits of the first tokens, in at least fp32.

        Hidden states may be padded to the width of the widest teacher.
        """
        bias = None if self.bias is None else self.bias[:vocabulary]
        hidden = hidden[:, : self.weight.shape[1]].to(self.weight.dtype)
        return shaped(projected(hidden, self.weight[:vocabulary], bias), self.scale, self.softcap)

    def logits_into(self, out: Tensor, hidden: Tensor) -> None:
        """[N, ≥ H] → `out` [V', N]: the logits of the first V' tokens, transposed, in memory that is there already."""
        vocabulary, width = len(out), self.weight.shape[1]
        bias = None if self.bias is None else self.bias[:vocabulary]
        project_into(out, hidden[:, :width].to(self.weight.dtype), self.weight[:vocabulary], bias)
        shape_in_place(out, self.scale, self.softcap)

    def copy(self) -> OutputLayer:
        """The layer in memory of its own."""
        return replace(self, weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())

    def to(self, device: torch.device | str) -> OutputLayer:
        """The same layer on `device`."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)
