"""The collectives that rlkd calls itself. Without a process group they act as a world of one rank."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")

CHUNK = 64 * 2**20
"""Bytes that `exchange` sends from each rank to each other at a time; they are copied to the process group's device."""


class RunStopped(RuntimeError):
    """The run cannot continue, for a reason outside rlkd that the user gets as one line.

    Raised on all ranks together, between iterations (see `on_every_rank`), it ends the run with a checkpoint.
    """


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


def _device() -> torch.device:
    """The device on which the process group's collectives expect their tensors."""
    on_gpu = initialized() and "nccl" in str(dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def all_reduce(values: Sequence[float], op: Literal["sum", "max"] = "sum") -> list[float]:
    """Each entry combined over the ranks, in float64. Every rank must call it with the same number of values."""
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
    """Every rank's `value`, by rank, on every rank (pickled; small things only)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def require_same_names(names: Sequence[str], what: str) -> None:
    """Raise unless every rank passes equal `names` in the same order. A collective.

    Values that are combined over the ranks by their position, as in `all_reduce`, must have the same names on
    every rank. One all-reduce of two numbers compares digests of 48 bits, which are exact in float64; the names
    themselves are sent only if they differ.

    Args:
        what: what is named, for the message, such as "metrics".

    Raises: RunStopped on all ranks together, with the names that are missing and where.
    """
    digest = float(int.from_bytes(hashlib.blake2b("\n".join(names).encode(), digest_size=6).digest(), "big"))
    highest, minus_lowest = all_reduce([digest, -digest], "max")
    if highest == -minus_lowest:
        return
    by_rank = gather(list(names))
    faults = []
    for name in sorted({name for names_there in by_rank for name in names_there}):
        without = [str(place) for place, names_there in enumerate(by_rank) if name not in names_there]
        if without:
            faults.append(f"{name} is missing on rank {', '.join(without[:8])}{' and others' * (len(without) > 8)}")
    found = "; ".join(faults[:8]) if faults else "another order or number of them"
    raise RunStopped(
        f"{what}: expected the same names on every rank, got differences: {found}; every rank must add every name, "
        "with a value and a count of 0 where it has nothing to add"
    )


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def on_rank_zero(act: Callable[[], T]) -> T:
    """What `act` returns on rank 0, on every rank; if it fails there, every rank raises.

    If only rank 0 raised, the others would wait forever. A RunStopped stays a RunStopped.
    """
    outcome: tuple[T | None, str | None, bool] = (None, None, False)
    failure: Exception | None = None
    if rank() == 0:
        try:
            outcome = (act(), None, False)
        except Exception as error:
            failure = error
            outcome = (None, str(error), isinstance(error, RunStopped))
    result, message, stopped = broadcast(outcome)
    if failure is not None:
        raise failure
    if message is not None:
        raise (RunStopped if stopped else RuntimeError)(f"on rank 0: {message}")
    return result  # type: ignore[no-any-return]


def on_every_rank(act: Callable[[], T]) -> T:
    """What `act`, which contains no collective, returns on this rank; if it fails on any rank, every rank raises.

    Otherwise the others would wait in the next collective until its time-out. If one rank fails with RunStopped and
    another with an error of another kind, all ranks raise the latter kind.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:
        failure = error
    severity = 0.0 if failure is None else 1.0 if isinstance(failure, RunStopped) else 2.0
    worst = all_reduce([severity], "max")[0]
    if worst == 0.0:
        return result  # type: ignore[return-value]
    if failure is not None and severity == worst:
        raise failure
    raise (RunStopped if worst == 1.0 else RuntimeError)("another rank failed; its error is above or in its own log")


def exchange(outgoing: Mapping[int, Any]) -> dict[int, Any]:
    """Send objects from rank to rank: `outgoing` by receiver. A collective, but for a rank only what it sends and gets.

    Objects are pickled, with tensors on the host, and may be large. All pairs of ranks send in the same all-to-all, so
    there is no order of sends and receives in which ranks could wait for each other.

    Returns: what this rank got, by sender. Raises: on all ranks, if one cannot pickle or unpickle an object.
    """
    ranks, device = range(world_size()), _device()

    def packed(to: int) -> Tensor:
        if to not in outgoing:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(outgoing[to])), dtype=torch.uint8)

    sent = on_every_rank(lambda: [packed(to) for to in ranks])
    sizes = torch.tensor([len(part) for part in sent], device=device)
    expected = torch.empty_like(sizes)
    dist.all_to_all_single(expected, sizes)
    received = [torch.empty(size, dtype=torch.uint8) for size in expected.tolist()]
    most = int(all_reduce([float(sizes.max())], "max")[0])
    for start in range(0, most, CHUNK):
        out = [part[start : start + CHUNK] for part in sent]
        into = [part[start : start + CHUNK] for part in received]
        lengths = [len(part) for part in into]
        got = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        dist.all_to_all_single(got, torch.cat(out).to(device), lengths, [len(part) for part in out])
        for part, whole in zip(into, got.cpu().split(lengths), strict=True):
            part.copy_(whole)
    return on_every_rank(
        lambda: {rank: pickle.loads(part.numpy().data) for rank, part in enumerate(received) if len(part)}
    )


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of `tensor`, or `tensor` itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_device(accelerator: Literal["auto", "cpu", "gpu"]) -> torch.device:
    """The device of this process for models other than the student."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def compute_dtype(
    precision: Literal["auto", "fp32", "bf16"], accelerator: Literal["auto", "cpu", "gpu"]
) -> torch.dtype:
    """What `trainer.precision` stands for in this process. auto: bf16 where the student is trained on a GPU, which is
    slow in fp32, and fp32 on a CPU, which is slow in bf16."""
    if precision == "auto":
        precision = "bf16" if local_device(accelerator).type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
