"""What lies in a run's directory: its checkpoints, and the student that it exported."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

NAME = re.compile(r"iteration-(\d{6,})")
FILE = "config.json"
"""In a checkpoint's folder: the configuration that it was trained under."""
DATA_FILE = "data.json"
"""Beside it: how many rows of data it was trained on, and their digest. Older checkpoints have none."""
EXPORT_RECORD = "rlkd.json"
"""In `<run>/hf`: what transformers does not ask for."""


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. Unfinished ones have another name until they are whole."""
    folder = Path(run_dir, "checkpoints")
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=iteration_of)


def iteration_of(checkpoint: Path) -> int:
    """How many iterations a checkpoint has seen."""
    return int(checkpoint.name.removeprefix("iteration-"))


def exported(run_dir: str | Path) -> int:
    """How many iterations the student in `<run>/hf` has seen; 0 where none was exported."""
    return seen_by(Path(run_dir, "hf"))


def seen_by(student: str | Path) -> int:
    """How many iterations an exported student, in the folder `student`, has seen; 0 for any other model."""
    record = Path(student, EXPORT_RECORD)
    return int(json.loads(record.read_text(encoding="utf-8"))["iteration"]) if record.exists() else 0


def save_config(config: BaseModel, folder: Path) -> None:
    """Keep `config` in a checkpoint's folder."""
    (folder / FILE).write_text(json.dumps(config.model_dump(mode="json"), indent=1), encoding="utf-8")


def save_data(data: Mapping[str, Any], folder: Path) -> None:
    """Keep in a checkpoint's folder what the data is that the run reads."""
    (folder / DATA_FILE).write_text(json.dumps(data), encoding="utf-8")
