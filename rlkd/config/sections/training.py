"""The sections `optim` and `trainer`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlkd.config.schedules import Constant, Schedule
from rlkd.config.sections.base import Section


class OptimConfig(Section):
    """AdamW."""

    lr: Schedule = Field(Constant(value=1e-6), description="learning rate, a number or a schedule over iterations")
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2, description="AdamW's decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="decoupled weight decay for weight matrices and embeddings; not applied to norms and biases",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="clip gradients to this norm")
    max_skipped: int = Field(
        2, ge=0, description="how many of the last 20 updates may be skipped because of a non-finite gradient"
    )


class TrainerConfig(Section):
    """Devices, precision and batch sizes."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="what to train on")
    devices: int = Field(1, ge=1, description="processes per node; torchrun's --nproc-per-node must agree")
    num_nodes: int = Field(1, ge=1, description="nodes; torchrun's --nnodes must agree")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="compute type; master weights and reductions are always fp32; auto: bf16 on a GPU, fp32 on a CPU",
    )
    micro_batch_tokens: int = Field(16384, ge=1, description="tokens per forward pass and device, padding included")
    compile: bool = Field(
        False, description="compile the student's blocks with torch.compile, which takes up to minutes at the start"
    )
    share_prompts: bool = Field(
        False,
        description="compute the completions of a prompt as one sequence, the prompt once: much less work where "
        "prompts are long",
    )
    shard_frozen: bool = Field(
        False,
        description="shard the layers of a local teacher, a self-teacher with fixed weights and the reference over "
        "the ranks, instead of a copy on each",
    )
    updates_per_iteration: int = Field(1, ge=1, description="optimizer steps per rollout batch; 1: strictly on-policy")
