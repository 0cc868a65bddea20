"""The section `model`: the student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlkd.config.sections.base import Section


class LoraConfig(Section):
    """LoRA adapters on frozen linear layers. No dropout: the trained distribution must equal the sampled one."""

    r: int = Field(16, ge=1, description="rank of an adapter")
    alpha: int = Field(32, ge=1, description="the adapter's output is scaled by alpha / r")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="names of the layers to adapt, e.g. [q_proj, v_proj]; never the output layer"
    )


class ModelConfig(Section):
    """The student."""

    path: str = Field(description="folder or hub id of the student, or builtin:student")
    attention: str | None = Field(
        None, description="attention implementation in transformers, e.g. sdpa, flash_attention_2"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    recompute_every: int = Field(
        1,
        ge=1,
        description="with gradient_checkpointing: recompute those of every n-th block only; 1: of all",
    )
    fp32_head: bool = Field(
        False,
        description="in bf16 runs, compute the output layer's logits in fp32, at trainer and servers: less mismatch "
        "between them, but a slower output layer",
    )
    lora: LoraConfig | None = Field(None, description="train LoRA adapters instead of all weights; null: all weights")
    trust_remote_code: bool = Field(
        False, description="allow Python code that comes with the model to run; enable only for models you trust"
    )
