"""The GPU plan of a run: which process is on which GPU of this machine, with how much memory, and what cannot work.

A pure function of the configuration and of the GPUs' memory. `seats` decides who is where; this file adds the memory
(`memory.py`), the table that a run prints at its start, and the lines that preflight prints instead.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from rlkd.config.schema import Config, ServedTeacherConfig, ServerConfig
from rlkd.generation.vllm import longest
from rlkd.models.vocabulary import load_config
from rlkd.planning.memory import GIB, ON_CPU, Place, gib, published_bytes, server_place, shape_of, trainer_place
from rlkd.servers.placement import Role, Seat, seats, used, weight_sync
from rlkd.teachers.served import teacher_longest

ASLEEP = 2 * GIB
"""Assumed: what a sleeping server keeps of a GPU, for its CUDA context, its graphs and NCCL."""

_KINDS: dict[Role, str] = {"trainer": "trainer", "policy": "policy server", "teacher": "teacher server"}
ROLES = tuple(_KINDS)


@dataclass(frozen=True, kw_only=True)
class Use:
    """The memory of one process on one GPU, in bytes."""

    seat: Seat
    sampling: float
    """While servers are awake."""
    training: float
    """While servers that sleep are asleep; the most at a time where none sleeps."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who is on which GPU."""

    config: Config
    memory: tuple[float, ...]
    """Bytes of each GPU of this machine; none: everything is on the CPU."""
    seats: tuple[Seat, ...]

    @cached_property
    def trainer(self) -> Place | str:
        """What each trainer needs, or why its architecture cannot be estimated. The models' files must exist."""
        try:
            return trainer_place(self.config)
        except ValueError as error:
            return str(error)

    def on(self, gpu: int) -> list[Seat]:
        """The processes on one GPU."""
        return [seat for seat in self.seats if gpu in seat.gpus]

    def uses(self, gpu: int) -> list[Use]:
        """What each process on one GPU takes, if `trainer` is known."""
        here = self.on(gpu)
        return [self._use(seat, self.memory[gpu], any(other.sleeps for other in here)) for seat in here]

    def _use(self, seat: Seat, size: float, sleeping: bool) -> Use:
        if seat.role == "trainer":
            assert isinstance(self.trainer, Place)
            peak = self.trainer.peak
            return Use(seat=seat, sampling=self.trainer.always if sleeping else peak, training=peak)
        return Use(seat=seat, sampling=seat.share * size, training=ASLEEP if seat.sleeps else seat.share * size)

    def together(self, gpu: int) -> tuple[float, float]:
        """Bytes of all processes on one GPU, (while servers sample, while the student trains)."""
        uses = self.uses(gpu)
        return sum(use.sampling for use in uses), sum(use.training for use in uses)

    # ---- as it is printed ---------------------------------------------------------------------------------------

    def table(self) -> str:
        """A line for each process on each GPU, their sum where a GPU has several, and how weights are sent.

        Neighbours that differ only in their numbers are one row.
        """
        blocks: list[tuple[list[int], list[str]]] = []
        for gpu in range(len(self.memory)):
            rows = self._rows(gpu)
            if blocks and blocks[-1][1] == rows and self.memory[gpu] == self.memory[gpu - 1]:
                blocks[-1][0].append(gpu)
            else:
                blocks.append(([gpu], rows))
        lines = [f"{'GPU':<8}{'memory':>10}  {'process':<18}{'takes':>10}"]
        for gpus, rows in blocks:
            heads = [f"{_ranges(gpus):<8}{gib(self.memory[gpus[0]]):>10}", *[" " * 18] * (len(rows) - 1)]
            lines += [f"{head}  {row}" for head, row in zip(heads, rows, strict=True)]
        on_cpu = [seat for seat in self.seats if not seat.gpus]
        if on_cpu and lines[1:]:  # trainers alone: where there are GPUs, every server has one
            takes = gib(self.trainer.peak) if isinstance(self.trainer, Place) else "not known"
            lines.append(f"{'CPU':<18}  {'trainer':<18}{takes:>10}  each of {len(on_cpu)}, {ON_CPU}")
        if any(seat.role == "policy" for seat in self.seats):
            kind = weight_sync(self.config, len(self.memory))
            lines.append(f"weights reach the policy's servers by {kind} (rollout.server.weight_sync)")
        return "\n".join(lines)

    def _rows(self, gpu: int) -> list[str]:
        """The rows of one GPU, without its number and memory."""
        size, here = self.memory[gpu], self.on(gpu)
        known = isinstance(self.trainer, Place)
        rows = []
        for seat in here:
            takes = "not known"
            if seat.role != "trainer" or known:
                use = self._use(seat, size, any(other.sleeps for other in here))
                takes = gib(max(use.sampling, use.training))
            rows.append(f"{_KINDS[seat.role]:<18}{takes:>10}  {self._note(seat)}")
        if len(here) > 1 and known:
            most = max(self.together(gpu))
            verdict = "fits" if most <= size else "DOES NOT FIT"
            rows.append(f"{'at most together':<18}{gib(most):>10}  {most / size:.2f} of the GPU: {verdict}")
        return rows or ["no process"]

    def _note(self, seat: Seat) -> str:
        if seat.role == "trainer":
            return "at most at a time, estimated" if isinstance(self.trainer, Place) else self.trainer
        notes = [f"{seat.share:g} of the GPU"]
        if len(seat.gpus) > 1:
            notes.append(f"one copy on GPU {_ranges(sorted(seat.gpus))}")
        if seat.by_default:
            notes.append("[[]] is the GPU of trainer 0")
        if seat.sleeps:
            notes.append(f"asleep while the student trains ({gib(ASLEEP)} stay)")
        if seat.turn:
            notes.append("starts after the one above")
        return "; ".join(notes)

    # ---- what cannot work ---------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """One line for each mistake that can be seen without the models: GPUs, shares, and ways to send weights."""
        problems, count = [], len(self.memory)
        for seat in self.seats:
            if seat.role == "trainer":
                continue
            absent = [gpu for gpu in seat.gpus if not 0 <= gpu < count]
            if absent:
                have = f"this machine shows {count} of them" + (f", {_ranges(range(count))}" if count else "")
                problems.append(f"{seat.key}: names GPU {absent[0]}, but {have}; {self._other_place(seat)}")
            if len(set(seat.gpus)) < len(seat.gpus):
                problems.append(f"{seat.key}: {list(seat.gpus)} names a GPU twice; name each GPU of a server once")
        problems += [
            f"rollout.server.devices: the servers on GPU {gpu} may take {self._shares(gpu):.3g} times its memory "
            f"together; lower {self._shares_of(gpu)}, or spread them over more GPUs"
            for gpu in range(count)
            if self._shares(gpu) > 1
        ][:1]
        return problems + self._sync_problems()

    def _shares(self, gpu: int) -> float:
        return sum(seat.share for seat in self.on(gpu))

    def _shares_of(self, gpu: int) -> str:
        """The keys of the shares on a GPU."""
        return " or ".join(dict.fromkeys(_memory_key(seat) for seat in self.on(gpu) if seat.share))

    def _other_place(self, seat: Seat) -> str:
        """Where a server of which the GPU does not exist could be instead."""
        count = len(self.memory)
        if count == 0:
            return "[[]] is one server on the CPU"
        free = [gpu for gpu in range(count) if not self.on(gpu)]
        if free:
            return f"no process uses GPU {_ranges(free)}"
        trainers = used([one for one in self.seats if one.role == "trainer"])
        shared = next((gpu for gpu in range(count) if gpu not in trainers), None)
        if shared is None:
            return (
                f"every GPU has a trainer; {seat.key}=[[]] shares that of trainer 0, with a small {_memory_key(seat)}"
            )
        others = self.on(shared)
        each = math.floor(90 / (len(others) + 1)) / 100
        settings = " ".join(f"{key}={each:g}" for key in dict.fromkeys(map(_memory_key, (*others, seat))))
        names = " and the ".join(one.name for one in others)
        return f"no GPU is free; to share GPU {shared} with the {names}: '{seat.key}=[[{shared}]]' {settings}"

    def _sync_problems(self) -> list[str]:
        """Ways to send weights, and sleep, that the devices rule out."""
        config, count = self.config, len(self.memory)
        if config.rollout.backend != "vllm" or "trainer" not in {seat.role for seat in self.seats}:
            return []
        key, kind = "rollout.server.weight_sync", config.rollout.server.weight_sync
        by_role = {role: [seat for seat in self.seats if seat.role == role] for role in ROLES}
        training, serving = used(by_role["trainer"]), used(by_role["policy"])
        problems = []
        if config.rollout.server.sleep and not all(seat.gpus for seat in by_role["policy"]):
            problems.append(
                f"rollout.server.sleep: is {config.rollout.server.sleep}, but on a CPU vLLM cannot sleep; set it to 0"
            )
        if kind in ("nccl", "ipc") and not training:
            problems.append(
                f"{key}: is {kind}, which sends from a GPU, but the student trains on the CPU; set it to auto"
            )
        elif kind == "nccl" and training & serving:
            problems.append(
                f"{key}: is nccl, which cannot join two processes on one GPU, but a policy server and a trainer share "
                f"GPU {min(training & serving)}; set it to auto, or choose other GPUs by rollout.server.devices"
            )
        elif kind == "ipc" and by_role["policy"] and serving - training:
            problems.append(
                f"{key}: is ipc, which sends within a GPU, but a policy server uses GPU {min(serving - training)}, on "
                f"which this machine has no trainer (of {count} GPUs); set it to auto"
            )
        return problems

    def memory_problems(self) -> list[str]:
        """One line for the first trainer and for each server that does not fit. The models' files must exist."""
        here = [seat for seat in self.seats if seat.gpus and set(seat.gpus) <= set(range(len(self.memory)))]
        trainers = [self._too_much(seat.gpus[0]) for seat in here if seat.role == "trainer"]
        servers = [line for seat in here if seat.role != "trainer" for line in self._too_small(seat)]
        return [line for line in trainers if line][:1] + servers

    def _too_much(self, gpu: int) -> str:
        """The line for a trainer's GPU of which too much is needed; empty if it has enough, or the need is unknown."""
        trainer, size = self.trainer, self.memory[gpu]
        servers = [seat for seat in self.on(gpu) if seat.share]
        if not isinstance(trainer, Place) or self._shares(gpu) > 1:  # then `problems` has a line
            return ""
        if not servers:
            if trainer.always <= size:  # exact, while the peak is an estimate
                return ""
            return (
                f"trainer.devices: each trainer needs {gib(trainer.always)} all the time, but GPU {gpu} has "
                f"{gib(size)}; use more GPUs, a smaller model, or model.lora"
            )
        sampling, training = self.together(gpu)
        if sampling <= size < training:
            return (
                f"trainer.micro_batch_tokens: each trainer needs about {gib(trainer.peak)} while it trains, beside "
                f"{gib(training - trainer.peak)} of the servers, but GPU {gpu} has {gib(size)}; lower it, or use more "
                "GPUs"
            )
        if sampling <= size:
            return ""
        need = next(use.sampling for use in self.uses(gpu) if use.seat.role == "trainer")
        keys = list(dict.fromkeys(map(_memory_key, servers)))
        most = math.floor(100 * (size - need) / size / len(servers)) / 100
        lower = f"lower {' and '.join(keys)} to at most {most:g}, or " if most >= 0.05 else ""
        names = " and ".join(f"the {seat.name} {seat.share:g} of it" for seat in servers)
        return (
            f"{keys[0]}: GPU {gpu} has {gib(size)}, but trainer {gpu} needs about {gib(need)}, {names}: together "
            f"{sampling / size:.2f} times its memory; {lower}choose other GPUs by {servers[0].key}"
        )

    def _too_small(self, seat: Seat) -> list[str]:
        """A server that cannot hold its weights and one sequence: vLLM refuses to start it."""
        config, size = self.config, min(self.memory[gpu] for gpu in seat.gpus)
        path, length = config.model.path, longest(config)
        server: ServerConfig = config.rollout.server
        if seat.role == "teacher":
            assert isinstance(config.teacher, ServedTeacherConfig)
            path, server, length = config.teacher.path, config.teacher.server, teacher_longest(config)
        known = load_config(path, config.model.trust_remote_code)
        if server.extra_args or getattr(known, "quantization_config", None) is not None:
            return []  # vLLM may need less than the estimate
        try:
            model = shape_of(path, config.model.trust_remote_code)
        except ValueError:
            return []  # not an architecture that can be estimated
        need = server_place(seat.name, model, server, len(seat.gpus), length)
        if need.peak <= seat.share * size:
            return []
        return [
            f"{_memory_key(seat)}: the {seat.name} needs {gib(need.always)} for its weights and "
            f"{gib(need.peak - need.always)} for one sequence, but {seat.share:g} of its GPU is "
            f"{gib(seat.share * size)}; raise it, or give it more GPUs by {seat.key}"
        ]


def gpu_plan(config: Config, memory: Sequence[float], roles: Collection[Role] = ROLES) -> Plan:
    """The plan of `config` on a machine whose GPUs have `memory` bytes each; without GPUs, everything is on the CPU."""
    known = tuple(seat for seat in seats(config, len(memory)) if seat.role in roles)
    return Plan(config=config, memory=tuple(memory), seats=known)


def gpu_memory() -> tuple[float, ...]:
    """Bytes of each GPU that this process sees."""
    return tuple(float(torch.cuda.get_device_properties(i).total_memory) for i in range(torch.cuda.device_count()))


def too_many_trainers(config: Config, gpus: int) -> list[str]:
    """A line if a node with so many GPUs has fewer than it has trainers. Without GPUs, `auto` trains on the CPU."""
    devices, accelerator = config.trainer.devices, config.trainer.accelerator
    if devices <= gpus or accelerator == "cpu" or (accelerator == "auto" and gpus == 0):
        return []
    if not gpus:
        return [
            "trainer.accelerator: is gpu, but torch finds no GPU on this node; set cpu, or correct the driver "
            "(nvidia-smi) or the build of torch"
        ]
    return [
        f"trainer.devices: is {devices} with trainer.accelerator {accelerator}, but this node has {gpus}; lower it, or "
        "set trainer.accelerator: cpu"
    ]


def room_problems(config: Config, gpus: int, free: float | None = None) -> list[str]:
    """Whether the directory of `weight_sync: file` has room for the weights that will lie there.

    Args:
        free: bytes; None: ask the disk.
    """
    server = config.rollout.server
    if config.rollout.backend != "vllm" or weight_sync(config, gpus) != "file":
        return []
    folder = Path("/dev/shm" if server.sync_dir is None else server.sync_dir).absolute()
    if free is None:
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    need = published_bytes(config, on_cpu=gpus == 0)
    if need <= free:
        return []
    more = ", or give the container more (docker run --shm-size)" if server.sync_dir is None else ""
    return [
        f"rollout.server.sync_dir: the published weights need {gib(need)} in {folder}, which has {gib(free)} free; "
        f"name a directory with room{more}"
    ]


def _memory_key(seat: Seat) -> str:
    return seat.key.removesuffix("devices") + "memory"


def _ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 7] → 3 to 5, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
