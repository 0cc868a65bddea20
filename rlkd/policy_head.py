"""Hidden states → log-probs and entropy of given tokens, without a [B, T, V] tensor.

The one place that wraps TRL's kernel (not a public API there: the version is pinned), and the one place with the
shift by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

VOCABULARY_CHUNK = 8192
"""Columns of logits that exist at a time, for up to 4,096 tokens."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the one forward of an update must give."""

    temperature: float
    """Logits are divided by it for `logprobs` and `entropy`: the rollout temperature."""
    entropy: bool = False


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """Per-token results of one forward. Column t speaks of token t given the tokens before it; column 0 is 0."""

    logprobs: Tensor  # [B, T] fp32
    entropy: Tensor | None = None  # [B, T] fp32


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(scale, soft cap) that the architecture applies to its raw logits; (1, None) for most.

    Raises: ValueError for an architecture whose transform we do not know how to read.
    """
    text = config.get_text_config()
    known = text.to_dict()
    softcap = known.get("final_logit_softcapping")
    scale = 1.0
    if known.get("logit_scale") is not None:  # Cohere
        scale = float(known["logit_scale"])
    elif known.get("logits_scaling") is not None and text.model_type.startswith("granite"):
        scale = 1.0 / float(known["logits_scaling"])
    elif any(known.get(key) is not None for key in ("logits_scaling", "lm_head_multiplier", "output_multiplier")):
        raise ValueError(f"model.path: the logits of {text.model_type} are scaled in a way that rlkd does not know")
    return scale, softcap


def token_logprobs(
    hidden: Tensor,
    head: nn.Linear,
    input_ids: Tensor,
    *,
    temperature: float,
    config: PreTrainedConfig,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z / temperature) at the given tokens, and the entropy of that distribution.

    Args:
        hidden: [B, T, H], last hidden states of the tokens `input_ids`.
        head: the output layer, weight [V, H].
        input_ids: [B, T].
        temperature: > 0.

    Returns: (log-probs [B, T] fp32, entropy [B, T] fp32 or None). Column t: token t given tokens < t; column 0: 0.
    """
    # Imported here: the kernel's package is slow to import, and a config error should not wait for it.
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows, columns, width = hidden.shape
    scale, softcap = logit_transform(config)
    flat = hidden[:, :-1].reshape(-1, width)
    targets = input_ids[:, 1:].reshape(-1)
    outputs = ("entropy",) if entropy else ()
    chunk = min(VOCABULARY_CHUNK, head.weight.shape[0])
    result = ChunkedLogProbFunction.apply(
        flat, head.weight, head.bias, targets, temperature, chunk, softcap, scale, outputs
    )

    def aligned(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values.view(rows, columns - 1), (1, 0))

    return aligned(result[0]), aligned(result[1]) if entropy else None
