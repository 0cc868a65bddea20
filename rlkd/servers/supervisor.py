"""Runs one server in a process session of its own and ends all of it, whatever happens to the trainer.

    python -m rlkd.servers.supervisor --parent PID --log FILE [--restarts N] -- COMMAND …
    python -m rlkd.servers.supervisor --parent PID --remove DIRECTORY

A vLLM server is a tree of processes: killing its API process leaves the engine and its workers running, with their
memory. So the supervisor runs between trainer and server and ends the server's whole process group when

- the trainer closes its end of the supervisor's stdin, on purpose or by dying,
- the trainer is gone although a forked child of it still holds that pipe (the supervisor's parent has changed),
- the server's first process ends by itself, or
- the supervisor gets SIGTERM.

A server that ended by itself is restarted, up to N times, once the trainer has written a line to the supervisor's
stdin to report that the server has answered. A server that cannot start at all therefore ends immediately.

The second form runs nothing, and removes the directory when the trainer is gone: weights in shared memory must not
outlive a killed trainer either.

If the supervisor itself is killed, the kernel sends the server's first process SIGTERM. Standard library only: it must
start fast and have nothing that can fail.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

POLL_S = 0.2
SCAN_S = 5.0
"""Seconds between scans of the server's shared memory; processes that were killed together cannot be scanned."""
GRACE_S = 5.0
"""Seconds from SIGTERM to SIGKILL."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def _in_child(supervisor: int) -> None:
    """Between fork and exec of the server."""
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:  # it died before the line above
        os._exit(1)


class _Trainer:
    """What the supervisor knows about the trainer process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.answered = False
        """Whether it has reported that the server answers."""

    def lives(self) -> bool:
        """Whether the trainer is alive; waits up to POLL_S for input."""
        readable, _, _ = select.select([0], [], [], POLL_S)
        received = os.read(0, 4096) if readable else None
        self.answered = self.answered or bool(received)
        return received != b"" and os.getppid() == self._pid


def _reap() -> dict[int, int]:
    """Exit codes of the children, adopted ones too, that have ended since the last call."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def shared_memory(group: int) -> set[Path]:
    """The files under /dev/shm that a process of the group has mapped or open."""
    found: set[Path] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
            if os.getpgid(int(process.name)) != group:
                continue
            for line in (process / "maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/dev/shm/") and not fields[5].endswith(" (deleted)"):
                    found.add(Path(fields[5]))
    return found


def end_group(group: int, segments: set[Path]) -> None:
    """SIGTERM, then SIGKILL, to every process of the group; returns when none is left.

    Then removes what is left of their shared memory: `segments` and those that they hold now.
    """
    segments = segments | shared_memory(group)
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 30.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            _reap()
            if not _group_lives(group):
                break
            time.sleep(0.02)
        else:
            continue
        break
    for segment in segments:
        segment.unlink(missing_ok=True)


def start(
    arguments: Sequence[str], log: IO[bytes] | int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a supervisor for this process. It acts when its stdin is closed.

    Args:
        arguments: after `--parent`.
        log: file for the supervisor's own errors.
        environment: of supervisor and server; None: this process's.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "rlkd.servers.supervisor", "--parent", str(os.getpid()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        start_new_session=True,  # Ctrl-C in the terminal reaches the trainer alone
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rlkd.servers.supervisor")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--log", default=os.devnull)
    parser.add_argument("--remove")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    command = args.command[1:]  # after --

    told_to_end = False

    def on_sigterm(signum: int, frame: object) -> None:
        nonlocal told_to_end
        told_to_end = True

    signal.signal(signal.SIGTERM, on_sigterm)
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C goes to the trainer, which decides
        signal.signal(number, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    trainer = _Trainer(args.parent)
    if args.remove is not None:
        while not told_to_end and trainer.lives():
            pass
        shutil.rmtree(args.remove, ignore_errors=True)
        return 0

    scratch = tempfile.mkdtemp(prefix="rlkd-")  # for sockets and the like, which a killed server does not remove
    exit_code: int | None = None
    with open(args.log, "ab", buffering=0) as log:
        for life in range(args.restarts + 1):
            server = _start(command, log, scratch)
            if life == 0:
                sys.stdout.write(f"{server.pid}\n")
                sys.stdout.flush()
                for descriptor in (1, 2):  # hold no pipe or terminal of the trainer's
                    os.dup2(log.fileno(), descriptor)
            exit_code, segments = None, set()
            next_scan = time.monotonic() + SCAN_S
            while exit_code is None and not told_to_end and trainer.lives():
                if time.monotonic() > next_scan:
                    segments |= shared_memory(server.pid)
                    next_scan = time.monotonic() + SCAN_S
                exit_code = _reap().get(server.pid)
            end_group(server.pid, segments)
            if exit_code is None or not trainer.answered:
                break
            log.write(f"supervisor: the server ended with exit code {exit_code}\n".encode())
    shutil.rmtree(scratch, ignore_errors=True)
    return 0 if exit_code is None else (exit_code if exit_code >= 0 else 128 - exit_code)


def _start(command: Sequence[str], log: IO[bytes], scratch: str) -> subprocess.Popen[bytes]:
    supervisor = os.getpid()
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, "TMPDIR": scratch},
        preexec_fn=lambda: _in_child(supervisor),  # safe: this process has one thread
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
