"""vLLM servers that we start: run under a supervisor, watched, and ended with the run."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlkd.config.schema import ServerConfig
from rlkd.servers import supervisor
from rlkd.servers.client import ServerError, VLLMClient
from rlkd.servers.command import ServerRole, server_command, server_environment


class VLLMServer:
    """One vLLM server process tree on this machine, which listens on `config.host` and asks for its key.

    `VLLMServer(...)` starts it and returns immediately; `wait_ready` waits until it answers. It ends with `stop`, or
    when this process ends in any way (see supervisor.py).
    """

    def __init__(
        self,
        role: ServerRole,
        config: ServerConfig,
        *,
        key: str,
        log_dir: str | os.PathLike[str],
        devices: Sequence[int] = (),
        cores: str | None = None,
    ) -> None:
        """
        Args:
            key: the key that every request to the server must carry.
            devices: GPU indices; empty: the CPU or the default GPU.
            cores: the CPU cores of a CPU server, e.g. "4-7".
        """
        self.name = role.name
        self.log = Path(log_dir) / f"{role.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            try:
                probe.bind((config.host, 0))
            except OSError as error:
                raise ServerError(
                    f"server.host: expected an address of this machine for the vLLM server {role.name!r}, got "
                    f"{config.host} ({error.strerror}); correct server.host"
                ) from error
            port = probe.getsockname()[1]
        self.url = f"http://{config.host}:{port}"
        self._timeout_s = config.start_timeout_s
        self._client = VLLMClient(self.url, timeout_s=config.request_timeout_s, key=key)

        command = server_command(role, config, host=config.host, port=port, tensor_parallel=max(len(devices), 1))
        variables = server_environment(role, config, host=config.host, key=key, cores=cores)
        if devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[device] for device in devices)
        arguments = ["--log", str(self.log), "--restarts", str(config.restarts), "--", *command]
        with open(self.log, "wb") as log:
            log.write((shlex.join(command) + "\n").encode())
            log.flush()
            self._supervisor = supervisor.start(arguments, log, variables)
        assert self._supervisor.stdout is not None
        with self._supervisor.stdout as output:
            first_line = output.readline()
        if not first_line:
            raise ServerError(self._failure_message("could not be started"))
        self.pid: int = int(first_line)
        """Pid of the server's first process, which leads its process group; it is not updated after a restart."""

    @property
    def supervisor_pid(self) -> int:
        return self._supervisor.pid

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the server answers.

        Args:
            timeout: seconds; None: the configured ones.

        Raises: ServerError when the server ends or does not answer in time; the server is then stopped. It is one
            line with the reason, and the end of the log where that names none.
        """
        limit_s = self._timeout_s if timeout is None else timeout
        deadline = time.monotonic() + limit_s
        while not self._client.healthy():
            code = self._supervisor.poll()
            if code is not None:
                raise ServerError(self._failure_message(f"ended with exit code {code} before it was ready"))
            if time.monotonic() > deadline:
                self.stop()
                raise ServerError(self._failure_message(f"did not answer within {limit_s:g} s"))
            time.sleep(0.25)
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.write(b"answered\n")  # from now on the supervisor restarts it when it dies
        self._supervisor.stdin.flush()

    @property
    def ended(self) -> bool:
        """Whether the server has ended and will not be restarted."""
        return self._supervisor.poll() is not None

    def check_alive(self) -> None:
        """Raises: ServerError, as `wait_ready` does, when the server has ended for good."""
        if self.ended:
            raise ServerError(self._failure_message(f"ended with exit code {self._supervisor.returncode}"))

    def stop(self) -> None:
        """End the server and everything that it started. May be called twice."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()
        try:
            self._supervisor.wait(supervisor.GRACE_S + 40.0)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()  # the kernel then sends the server SIGTERM
            self._supervisor.wait()
        self._client.close()

    def _failure_message(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        cause, log = cause_in(lines), f"its log is {self.log}"
        if cause is not None:
            return f"the vLLM server {self.name!r} {what}: {cause}; {log}"
        return "\n    ".join([f"the vLLM server {self.name!r} {what}; {log}, which ends:", *lines[-8:]])


def cause_in(log: Sequence[str]) -> str | None:
    """The last exception that the log of a server names, without the lists that vLLM appends; None if it names none.

    A validation error has its reason on the next line. The failure of vLLM's first process is only a consequence.
    """
    found = [(i, re.search(r"\b[A-Z]\w*(Error|Exception): .+", log[i])) for i in reversed(range(len(log)))]
    named = [(i, match[0]) for i, match in found if match is not None and " WARNING " not in log[i]]
    first = [(i, text) for i, text in named if "Engine core initialization failed" not in text]
    for i, text in first or named:
        more = log[i + 1 : i + 2] if "validation error" in text else []
        whole = " ".join(" ".join([text, *more]).split())
        return re.sub(r"\.? Supported architectures: .*", "", whole)[:300]
    return None


def cpu_cores(slot: int, slots: int) -> str:
    """The cores of CPU server number `slot` of `slots` in this run, from the last core down.

    The trainer's own share is the first cores. With fewer cores than servers + 1 they must be shared.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // (slots + 1))
    mine = [cores[(len(cores) - 1 - slot * each - i) % len(cores)] for i in range(each)]
    return ",".join(str(core) for core in sorted(mine))


def server_key(config: ServerConfig) -> str | None:
    """The key of servers that run already: the value of the environment variable `key_env`; None: not set."""
    return os.environ.get(config.key_env) or None


def new_key(config: ServerConfig) -> str:
    """The key of servers that we are about to start: that of the environment, or a fresh one."""
    return server_key(config) or secrets.token_urlsafe(32)


def launch(
    role: ServerRole,
    config: ServerConfig,
    *,
    run_dir: str | os.PathLike[str],
    entries: Sequence[int],
    slots: tuple[int, int],
    key: str,
) -> list[VLLMServer]:
    """Start one server per entry of `config.devices`, all at once; `wait_ready` comes later.

    Args:
        entries: which ones, by index.
        slots: (first, all): the number of entry 0 among all CPU servers of the run.
        key: of all of them.

    They are called role.name, or role.name-0, role.name-1 …

    Raises: RuntimeError for the first server that cannot be started; all others are then stopped.
    """
    servers: list[VLLMServer] = []
    try:
        for i in entries:
            servers.append(
                VLLMServer(
                    role if len(config.devices) == 1 else replace(role, name=f"{role.name}-{i}"),
                    config,
                    key=key,
                    log_dir=Path(run_dir) / "server",
                    devices=config.devices[i],
                    cores=cpu_cores(slots[0] + i, slots[1]),
                )
            )
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers


def wait_ready(servers: Sequence[VLLMServer]) -> None:
    """Wait until every one of `servers` answers.

    Raises: RuntimeError for the first server that fails; all are then stopped.
    """
    try:
        for server in servers:
            server.wait_ready()
    except BaseException:
        for server in servers:
            server.stop()
        raise
