"""A disk that is full or gone is the user's to know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from rlkd.distributed import RunStopped

_DISK = re.compile(r"inline_container\.cc|Parent directory .* does not exist|I/O error")
"""How torch (a RuntimeError) and safetensors speak of a disk that is full, read-only or gone."""


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Around the writing of files; torch and safetensors each have their own error for a full disk.

    Raises: RunStopped "`what` could not be written: …" for an error of the disk; any other error as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if not _of_disk(error):
            raise
        raise RunStopped(f"{what} could not be written: {_said(error)}") from error


def _of_disk(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):  # rank → (its error, its traceback)
        return bool(error.failures) and all(_of_disk(failure[0]) for failure in error.failures.values())
    if isinstance(error, OSError):
        return True
    return type(error) in (RuntimeError, SafetensorError) and _DISK.search(str(error)) is not None


def _said(error: BaseException) -> str:
    """On one line. A CheckpointException would begin with the traceback of a rank, and not come to what went wrong."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300]
