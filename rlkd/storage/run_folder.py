"""The layout of a run's directory: its checkpoints and its exported student."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlkd.storage import atomic

NAME = re.compile(r"iteration-(\d{6,})")
FILE = "config.json"
"""The file in a checkpoint with the configuration that it was trained with."""
DATA_FILE = "data.json"
"""The file in a checkpoint with the number of rows of the data and their digest. Older checkpoints have none."""
EXPORT_RECORD = "rlkd.json"
"""The file in `<run>/hf` with the iteration of the export; transformers ignores it."""

STAGES_FILE = "stages.json"
"""The file in `<run>` with the names of its stages in order; each has a folder of its own in it."""


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. An unfinished one has another name."""
    folder = Path(run_dir, "checkpoints")
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=iteration_of)


def iteration_of(checkpoint: Path) -> int:
    """The number of iterations after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("iteration-"))


def exported(run_dir: str | Path) -> int:
    """The number of iterations of the student in `<run>/hf`; 0 if none was exported."""
    return seen_by(Path(run_dir, "hf"))


def seen_by(student: str | Path) -> int:
    """The number of iterations of an exported student in the folder `student`; 0 for any other model."""
    return int(export_record(student).get("iteration", 0))


def export_record(student: str | Path) -> dict[str, Any]:
    """What a run has recorded of the student in the folder `student`; nothing for any other model.

    `iteration`; `waited`: the evaluations since the best one; and for the best student the metric.
    """
    record = Path(student, EXPORT_RECORD)
    return dict(json.loads(record.read_text(encoding="utf-8"))) if record.exists() else {}


def save_config(config: BaseModel, folder: Path) -> None:
    """Save `config` in a checkpoint's folder."""
    (folder / FILE).write_text(json.dumps(config.model_dump(mode="json"), indent=1), encoding="utf-8")


def save_data(data: Mapping[str, Any], folder: Path) -> None:
    """Save the identity of the run's data in a checkpoint's folder."""
    (folder / DATA_FILE).write_text(json.dumps(data), encoding="utf-8")


def save_stage_names(run_dir: str | Path, names: Sequence[str]) -> None:
    """Save the names of a run's stages, in order."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    atomic.write(Path(run_dir, STAGES_FILE), json.dumps(list(names)).encode())


def stage_names(run_dir: str | Path) -> list[str]:
    """The names of a run's stages, in order; none if it has no stages."""
    path = Path(run_dir, STAGES_FILE)
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
