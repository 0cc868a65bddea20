"""vLLM servers of our own: started under a guardian, watched, and ended with the run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rlkd.config import Config, ServedTeacher, ServerConfig
from rlkd.rollout import guardian
from rlkd.rollout.client import VLLMClient

_LAUNCHER_VARIABLES = re.compile(r"(MASTER_|TORCHELASTIC_|ROLE_|GROUP_)\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|PL_\w+")
"""What torchrun tells its workers; a server that read it would take itself for one of them."""


class VLLMServer:
    """One vLLM server process tree on this machine, reachable over loopback only.

    `VLLMServer(...)` starts it and returns at once; `wait_ready` waits until it answers. It ends with `stop`, or when
    this process ends in any way (see guardian.py).
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        config: ServerConfig,
        devices: Sequence[int],
        cores: str,
        max_model_len: int,
        log_dir: str | os.PathLike[str],
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            name: what the server calls its model, and the stem of its log file.
            model: folder or hub id.
            devices: GPU indices; empty: the CPU or the default GPU.
            cores: the CPU cores of a CPU server, e.g. "4-7".
            max_model_len: longest prompt + completion, unless the configuration has its own.
            arguments, environment: further ones of this server's role.
        """
        self.name = name
        self.log = Path(log_dir) / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._timeout_s = config.start_timeout_s
        self._client = VLLMClient(self.url, timeout_s=config.request_timeout_s)

        on_cpu = not torch.cuda.is_available()
        variables = {key: value for key, value in os.environ.items() if not _LAUNCHER_VARIABLES.fullmatch(key)}
        variables |= {
            "VLLM_SERVER_DEV_MODE": "1",  # the routes that update weights
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        if os.path.isdir(model):
            variables["HF_HUB_OFFLINE"] = "1"
        if on_cpu:
            variables["VLLM_CPU_KVCACHE_SPACE"] = f"{config.kv_cache_gb:g}"
            variables["VLLM_CPU_OMP_THREADS_BIND"] = cores
        if devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[device] for device in devices)
        variables |= environment or {}

        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", "float32" if on_cpu and config.dtype == "auto" else config.dtype]
        command += ["--max-model-len", str(config.max_model_len or max_model_len)]
        command += ["--generation-config", "vllm"]  # a model's own top-p or top-k must not slip into a request
        if on_cpu:
            command += ["--enforce-eager"]
        else:
            command += ["--gpu-memory-utilization", str(config.memory)]
        if len(devices) > 1:
            command += ["--tensor-parallel-size", str(len(devices))]
        command += [*arguments, *config.extra_args]

        with open(self.log, "wb") as log:
            log.write((" ".join(command) + "\n").encode())
            log.flush()
            self._guardian = guardian.start(["--log", str(self.log), "--", *command], log, variables)
        assert self._guardian.stdout is not None
        with self._guardian.stdout as said:
            first_line = said.readline()
        if not first_line:
            raise RuntimeError(self._epitaph("could not be started"))
        self.pid = int(first_line)
        """Of the server's first process, which leads its process group."""

    @property
    def guardian_pid(self) -> int:
        return self._guardian.pid

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return when the server answers.

        Args:
            timeout: seconds; None: the configured ones.

        Raises: RuntimeError, one line and the end of the log, when the server ends or does not answer in time; it is
            stopped then.
        """
        patience = self._timeout_s if timeout is None else timeout
        deadline = time.monotonic() + patience
        while not self._client.healthy():
            code = self._guardian.poll()
            if code is not None:
                raise RuntimeError(self._epitaph(f"ended with exit code {code} before it was ready"))
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(self._epitaph(f"did not answer within {patience:g} s"))
            time.sleep(0.25)

    def check_alive(self) -> None:
        """Raises: RuntimeError, one line and the end of the log, when the server has ended or its engine is dead."""
        code = self._guardian.poll()
        if code is not None:
            raise RuntimeError(self._epitaph(f"ended with exit code {code}"))
        if not self._client.healthy():
            raise RuntimeError(self._epitaph("does not answer"))

    def stop(self) -> None:
        """End the server and everything that it started. May be called twice."""
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        try:
            self._guardian.wait(guardian.GRACE_S + 40.0)
        except subprocess.TimeoutExpired:
            self._guardian.kill()  # the kernel then tells the server
            self._guardian.wait()
        self._client.close()

    def _epitaph(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        headline = f"the vLLM server {self.name!r} {what}{_cause(lines)}; its log is {self.log}, which ends:"
        return "\n    ".join([headline, *lines[-8:]])


def _cause(log: Sequence[str]) -> str:
    """The last exception that the log names, or nothing. A validation error says what is wrong in the line after."""
    for i in reversed(range(len(log))):
        found = re.search(r"\b[A-Z]\w*(Error|Exception): .+", log[i])
        if found is not None:
            more = log[i + 1 : i + 2] if "validation error" in found[0] else []
            return ": " + " ".join([found[0], *more]).strip()[:300]
    return ""


def cpu_cores(slot: int, slots: int) -> str:
    """The cores of CPU server number `slot` of `slots` in this run, from the last core down.

    The trainer's own share is the first cores. With fewer cores than servers + 1 they must be shared.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // (slots + 1))
    mine = [cores[(len(cores) - 1 - slot * each - i) % len(cores)] for i in range(each)]
    return ",".join(str(core) for core in sorted(mine))


def server_counts(config: Config) -> tuple[int, int]:
    """How many servers (of the policy, of the teacher) this run starts."""
    policy, teacher = config.rollout.server, config.teacher
    of_policy = len(policy.devices) if config.rollout.backend == "vllm" and policy.launch else 0
    of_teacher = len(teacher.server.devices) if isinstance(teacher, ServedTeacher) and teacher.server.launch else 0
    return of_policy, of_teacher


def launch(
    config: ServerConfig,
    *,
    role: str,
    model: str,
    max_model_len: int,
    run_dir: str | os.PathLike[str],
    slots: tuple[int, int],
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[VLLMServer]:
    """Start one server per entry of `config.devices`, all at once; `wait_ready` comes later.

    Args:
        role: "policy" or "teacher"; the servers are called role, or role-0, role-1 …
        slots: (first, all): the number of the first of them among all CPU servers of the run.

    Raises: RuntimeError of the first that cannot be started; none is left running then.
    """
    servers: list[VLLMServer] = []
    try:
        for i, devices in enumerate(config.devices):
            servers.append(
                VLLMServer(
                    name=role if len(config.devices) == 1 else f"{role}-{i}",
                    model=model,
                    config=config,
                    devices=devices,
                    cores=cpu_cores(slots[0] + i, slots[1]),
                    max_model_len=max_model_len,
                    log_dir=Path(run_dir) / "server",
                    arguments=arguments,
                    environment=environment,
                )
            )
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers


def wait_ready(servers: Sequence[VLLMServer]) -> list[str]:
    """The addresses of `servers`, once every one answers.

    Raises: RuntimeError of the first that fails; all are stopped then.
    """
    try:
        for server in servers:
            server.wait_ready()
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return [server.url for server in servers]
