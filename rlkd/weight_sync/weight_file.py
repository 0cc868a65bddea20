"""The trainer's side of weight updates through a file."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from rlkd.models.weights import TensorInfo
from rlkd.servers import supervisor
from rlkd.weight_sync.tensor_file import write_tensors


class SyncDirectory:
    """A directory through which weights reach the servers; it is removed when this process ends."""

    def __init__(self, directory: str | None) -> None:
        """
        Args:
            directory: on a disk that trainer and servers share; None: this machine's memory. The weights are in
                a new directory inside it, so that two runs never share one. `close` removes it, and so does the end of
                this process, however it ends.
        """
        parent = Path("/dev/shm" if directory is None else directory).resolve()
        parent.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix="rlkd-weights-", dir=parent))  # mode 0700
        self._supervisor: subprocess.Popen[bytes] | None = supervisor.start(
            ["--remove", str(self.directory)], subprocess.DEVNULL
        )

    def close(self) -> None:
        """Remove the directory."""
        if self._supervisor is not None:
            self._supervisor.communicate()  # closes its stdin; then it removes the directory and ends
            self._supervisor = None


class WeightFile(SyncDirectory):
    """The newest version of the weights, as one safetensors file."""

    def write(self, infos: Sequence[TensorInfo], tensors: Iterable[tuple[str, Tensor]], version: int) -> str:
        """Write all weights and return the file's name, relative to the directory. It is complete or absent."""
        name = f"weights-{version}.safetensors"
        unfinished = self.directory / f".{name}.{os.getpid()}"
        try:
            write_tensors(infos, tensors, unfinished)
            os.replace(unfinished, self.directory / name)
        finally:
            unfinished.unlink(missing_ok=True)
        return name

    def keep_only(self, name: str) -> None:
        """Remove the weights of other versions."""
        for path in self.directory.glob("weights-*.safetensors"):
            if path.name != name:
                path.unlink(missing_ok=True)
