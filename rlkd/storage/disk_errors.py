"""Turns the errors of a disk that is full or gone into one line for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from rlkd.distributed import RunStopped

_DISK = re.compile(r"inline_container\.cc|Parent directory .* does not exist|I/O error")
"""The messages of torch (a RuntimeError) and safetensors about a disk that is full, read-only or gone."""


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A context around writing files, since torch and safetensors have their own errors for a full disk.

    Raises: RunStopped "`what` could not be written: …" for an error of the disk. Any other error passes through.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if not _of_disk(error):
            raise
        raise RunStopped(f"{what} could not be written: {_message(error)}") from error


def _of_disk(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):  # rank → (its error, its traceback)
        return bool(error.failures) and all(_of_disk(failure[0]) for failure in error.failures.values())
    if isinstance(error, OSError):
        return True
    return type(error) in (RuntimeError, SafetensorError) and _DISK.search(str(error)) is not None


def _message(error: BaseException) -> str:
    """The message on one line. One of a CheckpointException starts with a traceback and would be cut too early."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300]
