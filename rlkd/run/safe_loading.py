"""Checkpoints are data: loading one runs no code of whoever wrote it."""

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
"""torch.distributed.checkpoint's index of a checkpoint: a pickle, read without any restriction."""

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
"""module → what the index of a checkpoint of ours may name."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(module, name)


def check_index(checkpoint: Path) -> None:
    """Raises: RunStopped when loading the checkpoint's index would call anything but torch's own index classes."""
    try:
        with open(checkpoint / METADATA, "rb") as file:
            _Index(file).load()
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise RunStopped(
            f"run.resume: {checkpoint}/{METADATA} is no index of a checkpoint: {error}; choose another checkpoint"
        ) from error


@contextmanager
def _data_only() -> Iterator[None]:
    """torch.load takes plain data only, also where its caller does not ask for that."""
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
    """Lightning's strategy, whose checkpoints hold data only."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises: RunStopped when the checkpoint names code to run, is cut off, or lacks a file."""
        check_index(Path(checkpoint_path))
        with _data_only():
            try:
                return super().load_checkpoint(checkpoint_path, weights_only=True)
            except (RunStopped, torch.OutOfMemoryError):
                raise  # both are RuntimeErrors, and neither is the checkpoint's fault
            except (pickle.UnpicklingError, CheckpointException, OSError, EOFError, RuntimeError, ValueError) as error:
                named = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
                if named is None:
                    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
                    cause = failures[0][0] if failures else error
                    said = " ".join(f"{type(cause).__name__}: {cause}".split())
                    raise RunStopped(
                        f"run.resume: {checkpoint_path} cannot be read: {said[:300]}; choose another checkpoint"
                    ) from error
                raise RunStopped(
                    f"run.resume: {checkpoint_path} names {named[1]}, code that loading it would run; choose another "
                    "checkpoint"
                ) from error
