"""Files and folders that are complete or absent, even if the process is killed while it writes or removes them.

During writing the name is hidden and ends in `.partial`, during removal in `.removed`. The next attempt overwrites
either.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial(path: Path) -> Path:
    """The name of `path` while it is being written, in the same folder, so that it can be renamed."""
    return path.with_name(f".{path.name}.partial")


def write(path: Path, content: bytes) -> None:
    """Replace the file `path` atomically: it has its old content or `content`."""
    beside = partial(path)
    beside.write_bytes(content)
    os.replace(beside, path)


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """An empty folder to write to, which replaces the folder `path` when the block has ended without an error.

    Others may read the new folder and its files, whatever the umask (0755 and 0644, and what the umask allows beyond
    that). safetensors creates files that only their owner can read.
    """
    beside = partial(path)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    allowed = beside.stat().st_mode & 0o7777
    yield beside
    for inner in (beside, *beside.rglob("*")):
        inner.chmod(allowed | 0o755 if inner.is_dir() else allowed & 0o666 | 0o644)
    remove(path)
    beside.rename(path)


def remove(folder: Path) -> None:
    """Remove the folder, if it exists; it is complete until it is gone."""
    beside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(beside, ignore_errors=True)
    if folder.exists():
        folder.rename(beside)
        shutil.rmtree(beside)


def sweep(folder: Path) -> None:
    """Remove what a killed process left in `folder`. No process may be writing there."""
    for pattern in (".*.partial", ".*.removed"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)
