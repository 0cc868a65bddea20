"""Rewards of many completions, computed in processes that can be killed.

A reward is foreign code that runs on the text of a model: it may hang, crash or print without end. So each call has a
wall-clock limit, enforced from outside, and a worker that exceeds it is killed with all its children. A reward that
could not be computed is None with the reason, never 0.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rlkd.config.schema import RewardConfig, RewardFunction
from rlkd.distributed import RunStopped
from rlkd.plugins import one_line, search_path
from rlkd.rewards import LARGEST
from rlkd.rewards.worker_process import Job, WorkerProcess

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


@dataclass(eq=False)
class _Submission:
    """The completions of one `submit`."""

    values: list[list[_Value]]
    """By completion and function."""
    missing: int
    """The number of calls without an outcome."""
    jobs: list[Job[_Submission]] = field(default_factory=list)
    answer: Future[list[RewardResult]] = field(default_factory=Future)


class RewardPool:
    """Worker processes that score completions. `open` once, `submit` or `score` often, then `close`.

    Also `with RewardPool(config)`. A thread distributes the completions, so callers need not wait for each other.
    Workers end with this process, however it ends.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._functions = config.functions
        self._names = part_names(config.functions)
        self._timeout_s = config.timeout_s
        self._size = config.workers
        self._setup = b""
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        """Of `_inbox`, `_closing` and `_failure`, which callers share with the thread."""
        self._inbox: list[_Submission] = []
        self._closing = False
        self._failure: BaseException | None = None
        """Why the thread has ended."""
        # What follows belongs to the thread.
        self._workers: list[WorkerProcess[_Submission]] = []
        self._queue: deque[Job[_Submission]] = deque()
        self._unanswered: set[_Submission] = set()

    def open(self) -> None:
        """Start the workers and wait until each has loaded the functions.

        Raises: RunStopped if a function cannot be loaded or a worker cannot start.
        """
        assert self._thread is None, "the pool is open"
        functions = [[f.name, f.options] for f in self._functions]
        self._setup = _line({"path": search_path(), "functions": functions})
        self._closing, self._failure = False, None
        self._awake, self._wake = os.pipe()
        os.set_blocking(self._awake, False)
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name="rlkd-rewards", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the workers and all processes that they started. What was not answered is cancelled."""
        if self._thread is None:
            return
        with self._lock:
            self._closing = True
        os.write(self._wake, b"x")
        self._thread.join()
        os.close(self._awake)
        os.close(self._wake)
        self._thread = None

    def __enter__(self) -> RewardPool:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Wait for the answer of `submit`."""
        return self.submit(items).result()

    def submit(self, items: Sequence[RewardItem]) -> Future[list[RewardResult]]:
        """The rewards of `items`, in their order. Each function has `timeout_s` seconds for each item.

        Safe to call from several threads. The future raises RunStopped if a worker cannot be restarted.

        Raises: RunStopped if meta or messages are not JSON.
        """
        assert self._thread is not None, "the pool is not open"
        functions = range(len(self._functions))
        submission = _Submission([[(None, None, None) for _ in functions] for _ in items], len(items) * len(functions))
        submission.jobs = [Job(submission, i, _payload(item), deque(functions)) for i, item in enumerate(items)]
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._inbox.append(submission)
        os.write(self._wake, b"x")
        return submission.answer

    # ---- in the thread ------------------------------------------------------------------------------------------

    def _serve(self, ready: Future[None]) -> None:
        """Answer submissions until `close`, or until a worker cannot be started."""
        failure: BaseException | None = None
        try:
            self._workers = [WorkerProcess(self._setup) for _ in range(self._size)]
            while self._receive():
                self._feed()
                self._wait()
                for i in range(len(self._workers)):
                    self._look_after(i)
                if not ready.done() and all(worker.ready for worker in self._workers):
                    ready.set_result(None)
        except BaseException as error:
            failure = error
        for worker in self._workers:
            worker.kill()
        self._workers = []
        with self._lock:
            self._failure = failure
            self._unanswered.update(self._inbox)
            self._inbox = []
        if failure is not None and not ready.done():
            ready.set_exception(failure)
        for submission in self._unanswered:
            if failure is None:
                submission.answer.cancel()
            elif submission.answer.set_running_or_notify_cancel():
                submission.answer.set_exception(failure)
        self._unanswered, self._queue = set(), deque()

    def _receive(self) -> bool:
        """Queue what was submitted; False if the pool is to be closed."""
        with self._lock:
            arrived, self._inbox = self._inbox, []
            closing = self._closing
        for submission in arrived:
            self._unanswered.add(submission)
            self._queue.extend(submission.jobs)
            self._answer_if_complete(submission)  # it may have no items
        return not closing

    def _feed(self) -> None:
        """Give jobs to workers: many at a time at first, one at a time near the end, so that no job waits behind a slow
        one while another worker is idle."""
        share = max(1, min(MAX_AHEAD, len(self._queue) // (2 * len(self._workers))))
        for worker in self._workers:
            given: list[Job[_Submission]] = []
            while worker.ready and self._queue and len(worker.jobs) + len(given) < share:
                job = self._queue.popleft()
                if not job.owner.answer.cancelled():
                    given.append(job)
            if given:
                worker.give(given)

    def _limit(self, worker: WorkerProcess[_Submission]) -> float:
        """Time limit of the worker's current call, in seconds."""
        if not worker.ready:
            return START_TIMEOUT_S
        return self._timeout_s if worker.jobs else math.inf

    def _wait(self) -> None:
        """Wait until a pipe is ready, something was submitted, or a worker has exceeded its limit."""
        poll = select.poll()
        poll.register(self._awake, select.POLLIN)
        for worker in self._workers:
            worker.register(poll)
        now = time.monotonic()
        remaining = min(worker.since + self._limit(worker) - now for worker in self._workers)
        busy = remaining < math.inf
        poll.poll(1000 * max(0.0, min(TICK_S, remaining)) + 1 if busy else None)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._awake, 4096):
                pass

    def _look_after(self, i: int) -> None:
        """Take the answers of worker `i`, and replace it if it has died or exceeded its limit."""
        worker = self._workers[i]
        worker.flush()
        cause = worker.exit()  # before receiving, so that all answers of a dead worker have arrived
        messages, ended = worker.receive()
        for message in messages:
            self._take(worker, message)
        if ended:
            cause = worker.exit(patience_s=1.0) or "its process closed its pipe"
        elif cause is None and worker.since + self._limit(worker) <= time.monotonic():
            cause = f"gave no answer within {self._limit(worker):g} s"
        if cause is not None:
            worker.kill()
            self._workers[i] = WorkerProcess(self._setup)
            self._blame(worker, cause)

    def _take(self, worker: WorkerProcess[_Submission], message: Any) -> None:
        """Store one message of a worker."""
        if not worker.ready:
            if message["ready"] is not None:
                raise RunStopped(message["ready"])
            worker.ready = True
            return
        item, function, value, error, words = message
        job = worker.jobs[0]
        assert (job.item, job.functions.popleft()) == (item, function), "a worker answered out of order"
        if not job.functions:
            worker.jobs.popleft()
        self._store(job, function, (value, error, words))

    def _blame(self, worker: WorkerProcess[_Submission], cause: str) -> None:
        """Record that the call in progress failed; the worker's other jobs return to the head of the queue."""
        if not worker.ready:
            raise RunStopped(f"a reward worker did not start: {cause}; see its output above")
        if worker.jobs:
            self._store(worker.jobs[0], worker.jobs[0].functions.popleft(), (None, cause, None))
        self._queue.extendleft(reversed([job for job in worker.jobs if job.functions]))

    def _store(self, job: Job[_Submission], function: int, value: _Value) -> None:
        job.owner.values[job.item][function] = value
        job.owner.missing -= 1
        self._answer_if_complete(job.owner)

    def _answer_if_complete(self, submission: _Submission) -> None:
        if submission.missing == 0:
            self._unanswered.discard(submission)
            if submission.answer.set_running_or_notify_cancel():
                submission.answer.set_result([self._result(row) for row in submission.values])

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
            f"{one_line(error)}; write such values as texts, or leave their columns out of the data"
        ) from error
