"""Files and folders that are complete or absent, even if the process is killed while it writes or removes them.

During writing the name is hidden and ends in `.partial`, during removal in `.removed`. The next attempt overwrites
either.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def partial(path: Path) -> Path:
    """The name of `path` while it is being written, in the same folder, so that it can be renamed."""
    return path.with_name(f".{path.name}.partial")


def write(path: Path, content: bytes) -> None:
    """Replace the file `path` atomically: it has its old content or `content`."""
    beside = partial(path)
    beside.write_bytes(content)
    os.replace(beside, path)


def share(folder: Path) -> None:
    """Give the files in `folder` the read and write permissions of the folder itself, which follow the umask.

    safetensors creates files that only their owner can read.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


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
