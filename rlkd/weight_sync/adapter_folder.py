"""The trainer's side of publishing adapters: PEFT folders that the servers load by name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlkd.config.schema import LoraConfig
from rlkd.models import lora
from rlkd.storage import atomic
from rlkd.weight_sync.weight_file import SyncDirectory


def version_of(name: str) -> int:
    """The version of an adapter, from the name that `AdapterFolder.write` gave it."""
    return int(name.rpartition("-v")[2])


class AdapterFolder(SyncDirectory):
    """The newest versions of the adapter, one folder each.

    A folder's name is the adapter's name at the servers. It is never used for another version or by another run,
    since vLLM would continue to serve the adapter that it has loaded under that name.
    """

    def __init__(self, directory: str | None, settings: LoraConfig, base: str, keep: int) -> None:
        """
        Args:
            directory: see `SyncDirectory`.
            base: folder or hub id of the model that the adapter belongs to.
            keep: how many versions may be in use at a time.
        """
        super().__init__(directory)
        self._settings = settings
        self._base = base
        self._keep = keep
        self._names: list[str] = []

    def write(self, adapter: Mapping[str, Tensor], version: int) -> str:
        """Write an adapter (full tensors, names of PEFT's files), completely or not at all, and return its name."""
        name = f"{self.directory.name}-v{version}"
        with atomic.folder(self.directory / name) as folder:
            lora.write(adapter, self._settings, self._base, folder)
        self._names.append(name)
        return name

    def path(self, name: str) -> Path:
        return self.directory / name

    def is_old(self, name: str) -> bool:
        """Whether `name` is an adapter of this run that no request will use again."""
        return name.startswith(f"{self.directory.name}-v") and name not in self._names[-self._keep :]

    def retire(self) -> None:
        """Mark all versions as old."""
        self._names = []

    def remove_old(self) -> None:
        """Remove old versions, which no server may have loaded: vLLM's engine dies if it needs their folder again."""
        for path in self.directory.iterdir():
            if self.is_old(path.name):
                shutil.rmtree(path)
