"""A disk that is full or gone is the user's to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from rlkd.distributed import RunStopped


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Around the writing of files; torch and safetensors each have their own error for a full disk.

    Raises: RunStopped "`what` could not be written: …".
    """
    try:
        yield
    except RunStopped:
        raise
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise RunStopped(f"{what} could not be written: {' '.join(str(error).split())[:300]}") from error
