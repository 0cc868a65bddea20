"""Which GPU each process of a run on this machine uses, and how weights can then reach the policy's servers.

Pure functions of the configuration and of the number of GPUs. `planning/gpu_plan.py` adds the memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from rlkd.config.schema import Config, ServedTeacherConfig, ServerConfig

Role = Literal["trainer", "policy", "teacher"]


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where one process of a run is."""

    role: Role
    name: str
    """trainer 0, policy server, teacher server 1 …"""
    key: str
    """The key of its devices: trainer.devices, rollout.server.devices or teacher.server.devices."""
    gpus: tuple[int, ...]
    """Indices within the GPUs that this process sees; empty: on the CPU."""
    by_default: bool = False
    """Whether it is a server of which `devices` is empty: vLLM then takes the first GPU it sees, that of trainer 0."""
    share: float = 0.0
    """A server: the part of each of its GPUs that vLLM takes for itself. A trainer takes what it needs."""
    sleeps: bool = False
    """Whether it gives its memory back while the student trains (`rollout.server.sleep`)."""
    turn: int = 0
    """A server: it starts when those of a lower turn with which it shares a GPU are ready. vLLM (0.32) counts what
    others allocate between its first look at the GPU and its profile as its own, and finds no room for its cache."""


def seats(config: Config, gpus: int | None = None) -> list[Seat]:
    """Every process that the run starts on this machine, if it is the first node: trainers, then servers.

    Args:
        gpus: how many GPUs this machine shows; None: ask torch. An index beyond them is kept: preflight reports it.
    """
    gpus = torch.cuda.device_count() if gpus is None else gpus
    trains_on_gpu = gpus > 0 and config.trainer.accelerator != "cpu"
    known = [
        Seat(role="trainer", name=f"trainer {i}", key="trainer.devices", gpus=(i,) if trains_on_gpu else ())
        for i in range(config.trainer.devices)
    ]
    policy, teacher = config.rollout.server, config.teacher
    if config.rollout.backend == "vllm" and policy.launch:
        known += _servers("policy", "rollout.server.devices", policy, gpus, sleeps=policy.sleep > 0)
    if isinstance(teacher, ServedTeacherConfig) and teacher.server.launch:
        known += _servers("teacher", "teacher.server.devices", teacher.server, gpus)
    turned: list[Seat] = []
    for seat in known:
        before = [other.turn for other in turned if other.share and set(other.gpus) & set(seat.gpus)]
        turned.append(replace(seat, turn=1 + max(before)) if seat.share and before else seat)
    return turned


def _servers(role: Role, key: str, server: ServerConfig, gpus: int, sleeps: bool = False) -> list[Seat]:
    alone = len(server.devices) == 1
    return [
        Seat(
            role=role,
            name=f"{role} server" if alone else f"{role} server {i}",
            key=key,
            gpus=tuple(devices) or ((0,) if gpus else ()),
            by_default=not devices,
            share=server.memory,
            sleeps=sleeps,
        )
        for i, devices in enumerate(server.devices)
    ]


def weight_sync(config: Config, gpus: int | None = None) -> Literal["file", "nccl", "ipc"]:
    """How weights reach the policy's servers: `rollout.server.weight_sync`, with `auto` decided here and nowhere else.

    nccl where the run starts servers on GPUs that no trainer uses; ipc for one server on the GPU of the only trainer;
    file on a CPU, with adapters, with any other sharing, and for running servers, whose GPUs are unknown, and which
    were started without knowing the trainers'.

    Args:
        gpus: see `seats`.
    """
    chosen = config.rollout.server.weight_sync
    if chosen != "auto":
        return chosen
    known = seats(config, gpus)
    trainers, servers = ([seat for seat in known if seat.role == role] for role in ("trainer", "policy"))
    if config.publishes_adapter or not servers or not all(seat.gpus for seat in (*trainers, *servers)):
        return "file"
    training, serving = used(trainers), used(servers)
    if not training & serving:
        return "nccl"
    return "ipc" if config.world_size == len(servers) == 1 and serving == training else "file"


def used(known: list[Seat]) -> set[int]:
    """The GPUs of these processes."""
    return {gpu for seat in known for gpu in seat.gpus}
