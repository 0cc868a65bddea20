"""What a run shows before its first iteration: each phase, such as loading a model, with its time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rich.console import Console

WIDTH = 40
"""Columns of a phase's name."""


def console() -> Console:
    """The output of this process: coloured, with a live line, on a terminal, and plain elsewhere."""
    return Console(highlight=False, soft_wrap=True)


def leads() -> bool:
    """Whether this process is the one of its run that prints."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


@contextlib.contextmanager
def phase(name: str, shown: bool) -> Iterator[None]:
    """Show on rank 0 what is being done, and afterwards how long it took: `loading the student   3.2 s`.

    Args:
        shown: `log.progress`; False: print nothing.
    """
    if not shown or not leads():
        yield
        return
    out, started = console(), time.perf_counter()
    with out.status(name) if out.is_terminal else contextlib.nullcontext():
        yield
    out.print(f"{name:<{WIDTH}} {time.perf_counter() - started:7.1f} s", markup=False)
