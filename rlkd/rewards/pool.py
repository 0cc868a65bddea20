"""Rewards of many completions, computed in processes that can be killed.

A reward is foreign code that runs on the text of a model: it may hang, crash or print without end. So each call has a
wall-clock limit, enforced from outside, and a worker that exceeds it is killed with all its children. A reward that
could not be computed is None with the reason, never 0.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlkd.config.schema import RewardConfig, RewardFunction
from rlkd.distributed import RunStopped
from rlkd.rewards import LARGEST, registry

START_TIMEOUT_S = 120.0
"""Limit of a worker's start: the imports of the user's module."""
MAX_AHEAD = 32
"""Items that may be queued at a worker: enough to keep it busy while this process serves others."""
TICK_S = 0.1
"""Interval of the check for workers that died while a child of theirs keeps the pipe open."""


@dataclass(frozen=True, kw_only=True)
class RewardItem:
    """One completion to judge. `meta` must be JSON."""

    completion: str
    answer: str | None
    prompt: str
    """The last user message."""
    messages: Sequence[Mapping[str, Any]] = ()
    """The whole prompt. Must be JSON too."""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """The answers of all functions for one completion."""

    reward: float | None
    """Σ weight · part; None if any part is None."""
    parts: dict[str, float | None]
    error: str | None
    """Which functions failed and why, on one line."""
    feedback: str | None = None
    """The texts of functions that return (reward, text), joined."""


def part_names(functions: Sequence[RewardFunction]) -> list[str]:
    """The functions' names; the second of equal ones gets "#2", and so on. Example: ["format", "format#2"]."""
    names: list[str] = []
    for i, function in enumerate(functions):
        earlier = sum(other.name == function.name for other in functions[:i])
        names.append(f"{function.name}#{earlier + 1}" if earlier else function.name)
    return names


_Value = tuple[float | None, str | None, str | None]
"""The outcome of one call: (reward, None, feedback or None) or (None, error, None)."""


@dataclass
class _Job:
    """One item at one worker, and the functions that have not answered yet."""

    item: int
    functions: deque[int]


class _Worker:
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
        self.jobs: deque[_Job] = deque()
        self.ready = False
        self.since = time.monotonic()
        """Start of the call in progress: the time of the last answer, or of the job that ended an idle period."""
        self._unsent = bytearray(setup)
        self._received = bytearray()

    def give(self, jobs: Sequence[_Job], messages: bytes) -> None:
        """Add `jobs`; `messages` is their encoding for the process."""
        if not self.jobs:
            self.since = time.monotonic()
        self.jobs.extend(jobs)
        self._unsent += messages
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


class RewardPool:
    """Worker processes that score completions. `open` once, `score` often, `close`; or `with RewardPool(config)`.

    Not thread-safe. Workers end with this process, however it ends.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._functions = config.functions
        self._names = part_names(config.functions)
        self._timeout_s = config.timeout_s
        self._size = config.workers
        self._workers: list[_Worker] = []
        self._setup = b""

    def open(self) -> None:
        """Start the workers and wait until each has loaded the functions.

        Raises: RunStopped if a function cannot be loaded or a worker cannot start.
        """
        assert not self._workers, "the pool is open"
        functions = [[f.name, f.options] for f in self._functions]
        self._setup = _line({"path": registry.search_path(), "functions": functions})
        self._workers = [_Worker(self._setup) for _ in range(self._size)]
        self._run([], [], [])

    def close(self) -> None:
        """Kill the workers and all processes that they started."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> RewardPool:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """The rewards of `items`, in their order. Each function has `timeout_s` seconds for each item.

        Raises: RunStopped if meta or messages are not JSON, or a worker cannot be restarted.
        """
        assert self._workers, "the pool is not open"
        payloads = [_payload(item) for item in items]
        values: list[list[_Value]] = [[(None, None, None)] * len(self._functions) for _ in items]
        self._run([_Job(i, deque(range(len(self._functions)))) for i in range(len(items))], payloads, values)
        return [self._result(row) for row in values]

    def _run(self, jobs: Sequence[_Job], payloads: Sequence[bytes], values: list[list[_Value]]) -> None:
        """Run until every worker is ready and every job is done. Writes values[item][function]."""
        queue = deque(jobs)
        try:
            while queue or any(worker.jobs or not worker.ready for worker in self._workers):
                self._feed(queue, payloads)
                self._wait()
                for i, worker in enumerate(self._workers):
                    worker.flush()
                    cause = worker.exit()  # before receiving, so that all answers of a dead worker have arrived
                    messages, ended = worker.receive()
                    for message in messages:
                        _take(worker, message, values)
                    if ended:
                        cause = worker.exit(patience_s=1.0) or "its process closed its pipe"
                    elif cause is None and worker.since + self._limit(worker) <= time.monotonic():
                        cause = f"gave no answer within {self._limit(worker):g} s"
                    if cause is not None:
                        worker.kill()
                        self._workers[i] = _Worker(self._setup)
                        _blame(worker, cause, queue, values)
        except BaseException:
            self.close()  # the next call cannot use workers with unfinished jobs
            raise

    def _feed(self, queue: deque[_Job], payloads: Sequence[bytes]) -> None:
        """Give jobs to workers: many at a time at first, one at a time near the end, so that no job waits behind a slow
        one while another worker is idle."""
        share = max(1, min(MAX_AHEAD, len(queue) // (2 * len(self._workers))))
        for worker in self._workers:
            given: list[_Job] = []
            while worker.ready and queue and len(worker.jobs) + len(given) < share:
                given.append(queue.popleft())
            if given:
                worker.give(given, b"".join(_message(job, payloads[job.item]) for job in given))

    def _limit(self, worker: _Worker) -> float:
        """Time limit of the worker's current call, in seconds."""
        if not worker.ready:
            return START_TIMEOUT_S
        return self._timeout_s if worker.jobs else float("inf")

    def _wait(self) -> None:
        """Wait until a pipe is ready, or a worker has exceeded its limit."""
        poll = select.poll()
        for worker in self._workers:
            worker.register(poll)
        now = time.monotonic()
        remaining = min(worker.since + self._limit(worker) - now for worker in self._workers)
        poll.poll(1000 * max(0.0, min(TICK_S, remaining)) + 1)

    def _result(self, values: Sequence[_Value]) -> RewardResult:
        parts = {name: value for name, (value, _, _) in zip(self._names, values, strict=True)}
        errors = [f"reward {name}: {error}" for name, (_, error, _) in zip(self._names, values, strict=True) if error]
        words = [text for _, _, text in values if text]
        total = None
        if not errors:
            total = sum(f.weight * (value or 0.0) for f, (value, _, _) in zip(self._functions, values, strict=True))
            if not abs(total) <= LARGEST:
                errors = [f"expected a weighted sum of the rewards from -{LARGEST:g} to {LARGEST:g}, got {total:g}"]
                total = None
        return RewardResult(
            reward=total, parts=parts, error="; ".join(errors) or None, feedback="\n".join(words) or None
        )


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _payload(item: RewardItem) -> bytes:
    """The item as JSON."""
    try:
        return json.dumps(
            {
                "completion": item.completion,
                "answer": item.answer,
                "prompt": item.prompt,
                "messages": [dict(message) for message in item.messages],
                "meta": dict(item.meta),
            }
        ).encode()
    except (TypeError, ValueError) as error:
        raise RunStopped(
            f"prompt {item.prompt[:40]!r}: expected columns and messages that are JSON, since rewards get them, got: "
            f"{registry.one_line(error)}; write such values as texts, or leave their columns out of the data"
        ) from error


def _message(job: _Job, payload: bytes) -> bytes:
    return b'{"job":%d,"functions":%s,"item":%s}\n' % (job.item, json.dumps(list(job.functions)).encode(), payload)


def _take(worker: _Worker, message: Any, values: list[list[_Value]]) -> None:
    """Store one message of a worker."""
    if not worker.ready:
        if message["ready"] is not None:
            raise RunStopped(message["ready"])
        worker.ready = True
        return
    item, function, value, error, words = message
    job = worker.jobs[0]
    assert (job.item, job.functions.popleft()) == (item, function), "a worker answered out of order"
    values[item][function] = (value, error, words)
    if not job.functions:
        worker.jobs.popleft()


def _blame(worker: _Worker, cause: str, queue: deque[_Job], values: list[list[_Value]]) -> None:
    """Record that the call in progress failed; the worker's other jobs return to the head of the queue."""
    if not worker.ready:
        raise RunStopped(f"a reward worker did not start: {cause}; see its output above")
    if worker.jobs:
        values[worker.jobs[0].item][worker.jobs[0].functions.popleft()] = (None, cause, None)
    queue.extendleft(reversed([job for job in worker.jobs if job.functions]))
