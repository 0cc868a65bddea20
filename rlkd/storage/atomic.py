"""Files and folders that are whole or absent, also when the process is killed in the middle.

What is being written is hidden and ends in `.partial`, what is being removed in `.removed`. Either is overwritten by
the next attempt.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def partial(path: Path) -> Path:
    """Where `path` is while it is being written: beside it, so that it can be renamed."""
    return path.with_name(f".{path.name}.partial")


def write(path: Path, content: bytes) -> None:
    """The file `path` is what it was before, or `content`."""
    beside = partial(path)
    beside.write_bytes(content)
    os.replace(beside, path)


def share(folder: Path) -> None:
    """Let others read the files in `folder` as far as they may read the folder itself, which the umask has settled.

    safetensors makes files that only their owner can read.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def remove(folder: Path) -> None:
    """The folder, if there is one, is whole until it is gone."""
    beside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(beside, ignore_errors=True)
    if folder.exists():
        folder.rename(beside)
        shutil.rmtree(beside)


def sweep(folder: Path) -> None:
    """Remove what a killed process left in `folder`. Nobody may be writing there."""
    for pattern in (".*.partial", ".*.removed"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)
