"""A process that computes rewards: `python -m rlkd.rewards.worker REQUEST_FD RESPONSE_FD`, started by `pool`.

It leads its own session. Both pipes carry one JSON value per line:

    in    {"path", "functions"}, once: a sys.path, and [name, options] pairs
    out   {"ready": null or an error}, once
    in    {"job", "functions", "item"}: indices of functions, and {"completion", "answer", "prompt", "messages", "meta"}
    out   [job, function, value or null, error or null, feedback or null], one by one as they finish

The pipes are separate descriptors, so that a reward cannot disturb them by printing or reading. They carry JSON and not
pickle, so that no answer of a worker can run code in the trainer.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import numbers
import os
import select
import signal
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rlkd.plugins import one_line
from rlkd.raised import place
from rlkd.rewards import LARGEST, registry

if TYPE_CHECKING:
    import asyncio


def main(request: int, response: int) -> None:
    """Answer requests until the pipe ends; then the supervisor kills the whole process group."""
    _start_supervisor(request, response)
    os.set_inheritable(request, False)  # programs that a reward starts must not inherit the pipes
    os.set_inheritable(response, False)
    me = os.getpid()

    def send(message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(response, data) :]

    with open(request, "rb", closefd=False) as lines:
        setup = json.loads(lines.readline())
        sys.path[:] = setup["path"]
        try:
            functions = [(registry.resolve(name), options) for name, options in setup["functions"]]
            with_messages = [registry.takes_messages(function) for function, _ in functions]
        except ValueError as problem:
            send({"ready": str(problem)})
            return
        for (name, _), (function, options) in zip(setup["functions"], functions, strict=True):
            if name in registry.BUILTIN:  # math takes a second to import: not within the first time limit
                function("\\boxed{0}", answer="0", prompt="", meta={}, **options)
        send({"ready": None})
        for line in lines:
            job = json.loads(line)
            for index in job["functions"]:
                function, options = functions[index]
                value, error, words = _call(function, options, job["item"], with_messages[index])
                if os.getpid() != me:
                    os._exit(0)  # a child forked by a reward, which must not answer too
                send([job["job"], index, value, error, words])


def _call(
    function: Callable[..., Any], options: dict[str, Any], item: dict[str, Any], with_messages: bool
) -> tuple[float | None, str | None, str | None]:
    """(reward, None, feedback or None), or (None, the error, None).

    A function returns a number, or (number, text), where the text is feedback for a teacher. A coroutine is awaited.
    """
    given = {"answer": item["answer"], "prompt": item["prompt"], "meta": dict(item["meta"])}
    if with_messages:
        given["messages"] = item["messages"]
    try:
        value = function(item["completion"], **given, **options)
        if inspect.iscoroutine(value):
            value = _loop().run(value)
        words = None
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str | None):
            value, words = value
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            value = value.item()  # of NumPy or PyTorch
        if isinstance(value, Decimal):
            value = float(value)
        if not isinstance(value, numbers.Real):
            return None, f"expected a finite number, or (number, text), got {_kind(value)}", None
        if isinstance(value, float) and not math.isfinite(value):
            return None, f"expected a finite number, got {value}", None
        number: Any = value  # an integer of any size
        if not -LARGEST <= number <= LARGEST:
            shown = f"an integer of {number.bit_length()} bits" if isinstance(number, int) else f"{float(number):g}"
            return None, f"expected a number from -{LARGEST:g} to {LARGEST:g}, got {shown}", None
        return float(number), None, words
    except BaseException as error:  # SystemExit too: this sample has no reward, and the error gives the reason
        return None, f"raised {one_line(error)}{place(error)}", None


@functools.cache
def _loop() -> asyncio.Runner:
    """One event loop for all calls, since a function may keep a session that belongs to it."""
    import asyncio  # here, since most workers never need it

    return asyncio.Runner()


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in value[:5])}"
    return "None" if value is None else type(value).__name__


def _start_supervisor(request: int, response: int) -> None:
    """Fork a process that kills this whole process group when the other end of `request` is closed.

    So rewards, and the processes that they started, end with the trainer, however it ends. A thread in this process is
    not enough, since a reward can hold the interpreter's lock for hours. PDEATHSIG is no alternative: it also fires if
    only the thread ends that started the worker. The double fork keeps a reward from waiting for it as for its child.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    os.close(response)  # otherwise the pool would not notice that a worker died
    hang_up = select.poll()
    hang_up.register(request, 0)  # no events asked for: only POLLHUP and POLLERR are reported
    hang_up.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
