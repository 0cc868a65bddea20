"""One reward worker as the pool sees it: a process, its two pipes, and the jobs that it has."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Owner = TypeVar("Owner")


@dataclass(eq=False)
class Job(Generic[Owner]):
    """One completion at one worker, and the functions that have not answered yet."""

    owner: Owner
    """What the job belongs to."""
    item: int
    """The index of the completion there."""
    payload: bytes
    """The completion as JSON."""
    functions: deque[int] = field(default_factory=deque)

    def message(self) -> bytes:
        """The job as the worker reads it."""
        return b'{"job":%d,"functions":%s,"item":%s}\n' % (
            self.item,
            json.dumps(list(self.functions)).encode(),
            self.payload,
        )


class WorkerProcess(Generic[Owner]):
    """One worker process, its two pipes, and its jobs."""

    def __init__(self, setup: bytes) -> None:
        request_out, self._request = os.pipe()
        self._response, response_in = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlkd.rewards.worker", str(request_out), str(response_in)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what rewards print goes to our stderr
            pass_fds=(request_out, response_in),
            start_new_session=True,
        )
        os.close(request_out)
        os.close(response_in)
        os.set_blocking(self._request, False)
        os.set_blocking(self._response, False)
        self.jobs: deque[Job[Owner]] = deque()
        self.ready = False
        self.since = time.monotonic()
        """Start of the call in progress: the time of the last answer, or of the job that ended an idle period."""
        self._unsent = bytearray(setup)
        self._received = bytearray()

    def give(self, jobs: Sequence[Job[Owner]]) -> None:
        """Add `jobs`."""
        if not self.jobs:
            self.since = time.monotonic()
        self.jobs.extend(jobs)
        self._unsent += b"".join(job.message() for job in jobs)
        self.flush()

    def flush(self) -> None:
        """Write as much as the pipe accepts now. A dead process is noticed when receiving."""
        while self._unsent:
            try:
                written = os.write(self._request, self._unsent[:65536])
            except (BlockingIOError, BrokenPipeError):
                return
            del self._unsent[:written]

    def register(self, poll: select.poll) -> None:
        """Make `poll` wake up when there is something to receive or to flush."""
        poll.register(self._response, select.POLLIN)
        if self._unsent:
            poll.register(self._request, select.POLLOUT)

    def receive(self) -> tuple[list[Any], bool]:
        """(the messages that have arrived, whether the pipe has ended)."""
        ended = False
        while True:
            try:
                data = os.read(self._response, 65536)
            except BlockingIOError:
                break
            if not data:
                ended = True
                break
            self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        if lines:
            self.since = time.monotonic()
        return [json.loads(line) for line in lines], ended

    def exit(self, patience_s: float = 0.0) -> str | None:
        """How the process ended; None while it runs. Waits up to `patience_s`.

        It stays a zombie, so that its process group cannot be reused before `kill`.
        """
        until = time.monotonic() + patience_s
        while (status := os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
            if time.monotonic() >= until:
                return None
            time.sleep(0.002)
        how = "exited with status" if status.si_code == os.CLD_EXITED else "was killed by signal"
        return f"its process {how} {status.si_status}"

    def kill(self) -> None:
        """End the worker and all of its process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._request)
        os.close(self._response)
