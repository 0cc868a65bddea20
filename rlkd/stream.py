"""The background thread in which the groups of an iteration flow, and how models in this process batch their requests.

Each group of completions is one coroutine, a task of an asyncio event loop in a thread of its own. While one group
waits for its rewards, others are sampled or scored. Nothing in this thread may call a collective.

A model in this process (`Station`) answers requests in batches, one batch at a time. How a batch is composed decides
how its numbers are rounded. With `together`, a batch begins only when every open task waits for some model, and it has
all requests to the earliest model of the line, ordered by the tasks' places. Then it is a function of the requests and
not of time: an iteration that is repeated gives the same bits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import queue
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Request = TypeVar("Request")
Answer = TypeVar("Answer")

Place = tuple[int, ...]
"""Where a task is in the order of a run, such as (iteration, index of the prompt)."""

_THREADS = 1024
"""The largest number of requests to servers at a time. Each stage has a limit of its own, which is lower."""

_MOMENT = 0.02
"""Seconds between two turns in which this process has nothing to compute."""

_place: contextvars.ContextVar[Place] = contextvars.ContextVar("place")


class Stream:
    """An event loop in a background thread. The thread starts with the first task; `close` ends it.

    `submit`, `result` and `run` are for other threads, everything else is for coroutines in the loop.
    """

    def __init__(self, *, together: bool, ahead: bool) -> None:
        """
        Args:
            together: whether a model's batch waits until every open task waits (see above). False: it begins as soon
                as the model is free, with the requests that are there.
            ahead: whether models compute while no thread waits for results, in a thread of their own. False: in the
                thread that waits in `result` or `run`. That is faster where the same thread trains afterwards: OpenMP
                keeps a pool of workers for each thread that calls torch, and workers of two pools sleep between calls.
        """
        self._together = together
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._models = ThreadPoolExecutor(1, "rlkd-models", _leave_signals) if ahead else _WaitingThread()
        self._server_threads = ThreadPoolExecutor(_THREADS, "rlkd-requests", _leave_signals)
        self._stations: list[Station[Any, Any]] = []
        self._open = 0
        """Tasks that may still make a request: all that were started and have not ended, except those in a `Pause`."""
        self._waiting = 0
        """Requests of the stations that no batch has taken."""
        self._batch: asyncio.Task[None] | None = None
        """The batch that is being computed."""

    # ---- from other threads -------------------------------------------------------------------------------------

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run `coroutine` in the background. It may start tasks, and makes no request to a model itself."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), name="rlkd-stream", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def result(self, future: concurrent.futures.Future[T], turn: Callable[[bool], bool] | None = None) -> T:
        """Wait for the result of a coroutine that `submit` was given.

        Args:
            turn: where models of several processes compute together, called again and again while no model of this one
                is asked for anything, with whether `future` is still open, until it returns False: no process waits.
                Only without `ahead`, since two threads would call collectives in any order.
        """
        if isinstance(self._models, _WaitingThread):
            while turn is not None and turn(not future.done()):
                self._models.work_once()
            self._models.work_until(future)
        else:
            assert turn is None, "the configuration was checked"
        return future.result()

    def run(self, coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run `coroutines` as tasks, in the order of their places, and wait for all results.

        Raises: the first error of any of them; the others are cancelled.
        """

        async def together() -> list[T]:
            with first_error():
                async with asyncio.TaskGroup() as group:
                    tasks = [self.start(group, (i,), coroutine) for i, coroutine in enumerate(coroutines)]
            return [task.result() for task in tasks]

        return self.result(self.submit(together()))

    def close(self) -> None:
        """Cancel all tasks, and wait for the batch in progress. Requests to servers end with their servers."""
        if self._loop is not None and self._thread is not None:
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
            self._models.shutdown(cancel_futures=True)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._loop, self._thread = None, None
        self._server_threads.shutdown(wait=False, cancel_futures=True)

    # ---- in the loop --------------------------------------------------------------------------------------------

    def start(self, group: asyncio.TaskGroup, place: Place, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `coroutine` as a task of `group` that may ask stations, one request at a time."""
        context = contextvars.copy_context()
        context.run(_place.set, place)
        self._open += 1  # now and not when the task begins, so that no batch begins without it
        task = group.create_task(coroutine, context=context)
        task.add_done_callback(lambda _: self._closed())
        return task

    async def in_thread(self, act: Callable[[], T]) -> T:
        """What `act`, which waits for a server or a disk, returns; called in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._server_threads, act)

    def _closed(self) -> None:
        self._open -= 1
        self._look()

    def _look(self) -> None:
        """Begin the next batch, if it is time."""
        if self._batch is not None or (self._together and self._waiting < self._open):
            return
        station = next((station for station in self._stations if station.requests), None)
        if station is not None:
            asked = sorted(station.requests, key=lambda request: request.place)
            station.requests.clear()
            self._waiting -= len(asked)
            self._batch = asyncio.get_running_loop().create_task(self._compute(station, asked))

    async def _compute(self, station: Station[Request, Answer], asked: list[_Asked[Request, Answer]]) -> None:
        loop = asyncio.get_running_loop()

        def deliver(index: int, answer: Answer) -> None:
            loop.call_soon_threadsafe(asked[index].answer_with, answer)

        def act() -> None:
            station.act([one.request for one in asked], deliver)

        try:
            await loop.run_in_executor(self._models, act)
        except Exception as error:  # it belongs to those that asked
            for one in asked:
                if not one.answer.done():
                    one.answer.set_exception(error)
        finally:
            self._batch = None
        self._look()


class _WaitingThread(concurrent.futures.Executor):
    """Does what is submitted to it in the thread that waits for the result."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]
        self._asked = queue.SimpleQueue()

    def submit(self, act: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """Have `act` called by the next thread in `work_until`."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._asked.put((future, functools.partial(act, *args, **kwargs)))
        return future

    def work_until(self, end: concurrent.futures.Future[Any]) -> None:
        """Do what is submitted, until `end` is done."""
        end.add_done_callback(lambda _: self._asked.put(None))
        while not end.done():
            self._do(self._asked.get())

    def work_once(self) -> None:
        """Do what is submitted next, or wait a moment for it."""
        with contextlib.suppress(queue.Empty):
            self._do(self._asked.get(timeout=_MOMENT))

    def _do(self, asked: tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None) -> None:
        if asked is not None and asked[0].set_running_or_notify_cancel():
            future, act = asked
            try:
                future.set_result(act())
            except Exception as error:  # it belongs to who submitted it
                future.set_exception(error)


class Station(Generic[Request, Answer]):
    """One kind of request to a model in this process. Stations are created in the order of the line."""

    def __init__(self, stream: Stream, act: Callable[[list[Request], Callable[[int, Answer], None]], None]) -> None:
        """
        Args:
            act: answers all requests of a batch: calls its second argument with the index of a request and its answer,
                for each of them, as soon as it has it. Its thread is that of `Stream`.
        """
        self._stream = stream
        self.act = act
        self.requests: list[_Asked[Request, Answer]] = []
        stream._stations.append(self)

    async def ask(self, request: Request) -> Answer:
        """The answer to `request`, once a batch has it."""
        asked: _Asked[Request, Answer] = _Asked(_place.get(), request, asyncio.get_running_loop().create_future())
        self.requests.append(asked)
        self._stream._waiting += 1
        self._stream._look()
        try:
            return await asked.answer
        except asyncio.CancelledError:
            if asked in self.requests:
                self.requests.remove(asked)
                self._stream._waiting -= 1
            raise


@dataclass(eq=False)
class _Asked(Generic[Request, Answer]):
    place: Place
    request: Request
    answer: asyncio.Future[Answer]

    def answer_with(self, answer: Answer) -> None:
        if not self.answer.done():  # the task may have been cancelled
            self.answer.set_result(answer)


class Pause(Generic[T]):
    """Where a task waits for other tasks. Meanwhile no batch waits for it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._value: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waits = False

    async def wait(self) -> T:
        """The value that `end` gets."""
        if not self._value.done():
            self._waits = True
            self._stream._open -= 1
            self._stream._look()
        try:
            return await self._value
        finally:
            self._resume()

    def end(self, value: T) -> None:
        """Let the task go on. It counts as open at once, so that the next batch waits for it."""
        if not self._value.done():
            self._value.set_result(value)
        self._resume()

    def _resume(self) -> None:
        if self._waits:
            self._waits = False
            self._stream._open += 1


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """Around an `asyncio.TaskGroup`: raise the error that made it cancel its other tasks, and not a group of errors."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    _leave_signals()
    loop.run_forever()


def _leave_signals() -> None:
    """Leave signals to the main thread: only if it gets them does its waiting for a batch end at once."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
