"""A process that computes rewards: `python -m rlkd.rewards.worker REQUEST_FD RESPONSE_FD`, started by `pool`.

It leads its own session. Both pipes carry one JSON value a line:

    in    {"path", "functions"}, once: a sys.path, and [name, options] pairs
    out   {"ready": null or an error}, once
    in    {"job", "functions", "item"}: indices of functions, and {"completion", "answer", "prompt", "messages", "meta"}
    out   [job, function, value or null, error or null, feedback or null], one by one as they finish

The pipes are descriptors of their own, so what a reward prints or reads cannot disturb them. JSON, not pickle: nothing
that comes through the pipe can run code in the trainer.
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

from rlkd.rewards import LARGEST, registry

if TYPE_CHECKING:
    import asyncio


def main(request: int, response: int) -> None:
    """Answer requests until the pipe ends; then the guardian kills the whole process group."""
    _start_guardian(request, response)
    os.set_inheritable(request, False)  # programs that a reward starts have no business with the pipes
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
            if name in registry.BUILTIN:  # math imports for a second: now, not within the time limit of the first call
                function("\\boxed{0}", answer="0", prompt="", meta={}, **options)
        send({"ready": None})
        for line in lines:
            job = json.loads(line)
            for index in job["functions"]:
                function, options = functions[index]
                value, error, words = _call(function, options, job["item"], with_messages[index])
                if os.getpid() != me:
                    os._exit(0)  # a reward forked, and this is the child coming home: it must not answer too
                send([job["job"], index, value, error, words])


def _call(
    function: Callable[..., Any], options: dict[str, Any], item: dict[str, Any], with_messages: bool
) -> tuple[float | None, str | None, str | None]:
    """(reward, None, feedback or None), or (None, what was wrong with the call, None).

    A function returns a number, or (number, text): what it has to say of the completion, for a teacher to read. A
    coroutine is awaited.
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
    except BaseException as error:  # SystemExit too: whatever a reward does, this sample has no reward, and says why
        return None, f"raised {registry.one_line(error)}", None


@functools.cache
def _loop() -> asyncio.Runner:
    """One event loop for all calls: what a function keeps between them, a session say, belongs to it."""
    import asyncio  # only who needs it waits for it

    return asyncio.Runner()


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in value[:5])}"
    return "None" if value is None else type(value).__name__


def _start_guardian(request: int, response: int) -> None:
    """Fork a process that kills this whole group as soon as nobody holds the other end of `request`.

    So rewards, and what they started, end with the trainer however it ends. A thread in this process would not do: a
    reward can hold the interpreter's lock for hours. Nor would PDEATHSIG: it also fires when only the thread ends that
    started the worker. Forked twice, so that the guardian is no child that a reward could wait for.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    os.close(response)  # or the pool would not see the end of a worker that died
    hang_up = select.poll()
    hang_up.register(request, 0)  # no events asked for: only POLLHUP and POLLERR are reported
    hang_up.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
