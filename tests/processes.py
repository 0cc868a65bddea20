"""Waits for processes to end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def group_members(group: int) -> list[str]:
    """Command lines of all processes in the process group, except zombies, which have none."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.getpgid(int(process.name)) == group:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (ProcessLookupError, FileNotFoundError):
            pass
    return [line for line in found if line]


def wait_until(true: Callable[[], bool], seconds: float) -> float:
    """Wait until the condition holds and return the seconds it took; fail after `seconds`."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - start
