"""The few collectives that we call ourselves. Without a process group they act for a world of one rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


def _device() -> torch.device:
    """Where the process group's collectives want their tensors."""
    on_gpu = initialized() and "nccl" in str(dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def all_reduce(values: Sequence[float], op: Literal["sum", "max"] = "sum") -> list[float]:
    """Each entry combined over the ranks, in float64. Every rank must call it with equally many values."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=_device())
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return [float(v) for v in tensor.tolist()]


def broadcast(value: Any) -> Any:
    """Rank 0's `value`, on every rank (pickled; small things only)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def local_device(accelerator: Literal["auto", "cpu", "gpu"]) -> torch.device:
    """The device of this process for models that stand beside the trained one."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
