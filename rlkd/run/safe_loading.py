"""Loads checkpoints as data only, so that a manipulated checkpoint cannot run code."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from rlkd.distributed import RunStopped

METADATA = ".metadata"
"""The index file of torch.distributed.checkpoint: a pickle, which torch loads without restrictions."""

_NAMES = {
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
}
"""module → the names that the index of one of our checkpoints may use."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(module, name)


def check_index(checkpoint: Path) -> None:
    """Check a checkpoint's index before torch loads it.

    Raises: RunStopped if loading the index would call anything except torch's own index classes.
    """
    try:
        with open(checkpoint / METADATA, "rb") as file:
            _Index(file).load()
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise RunStopped(
            f"run.resume: {checkpoint}/{METADATA} is not a valid checkpoint index: {error}; choose another checkpoint"
        ) from error


@contextmanager
def _data_only() -> Iterator[None]:
    """Inside, torch.load accepts only plain data, even if its caller does not request that."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class SafeModelParallelStrategy(ModelParallelStrategy):
    """Lightning's strategy, restricted to loading checkpoints that contain only data."""

    def setup_environment(self) -> None:
        """Meet the other ranks. Raises: RunStopped if the port for it is taken, or if they cannot be reached."""
        try:
            super().setup_environment()
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = " ".join(str(error).split())[:200]
            raise RunStopped(
                f"MASTER_PORT: the ranks cannot meet at {place}: {reason}; choose a free port, and an address that all "
                "nodes reach"
            ) from error

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint. Raises: RunStopped if it would run code, is truncated, or lacks a file."""
        check_index(Path(checkpoint_path))
        with _data_only():
            try:
                return super().load_checkpoint(checkpoint_path, weights_only=True)
            except (RunStopped, torch.OutOfMemoryError):
                raise  # both are RuntimeErrors, but not caused by the checkpoint
            except (pickle.UnpicklingError, CheckpointException, OSError, EOFError, RuntimeError, ValueError) as error:
                named = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
                if named is None:
                    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
                    cause = failures[0][0] if failures else error
                    message = " ".join(f"{type(cause).__name__}: {cause}".split())
                    raise RunStopped(
                        f"run.resume: {checkpoint_path} cannot be read: {message[:300]}; choose another checkpoint"
                    ) from error
                raise RunStopped(
                    f"run.resume: loading {checkpoint_path} would run code ({named[1]}); choose another checkpoint"
                ) from error
