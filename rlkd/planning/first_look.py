"""Checks that need neither torch nor a model: the run's directory, the tracker, and whether models and data are there.

They take a fraction of a second, before ten of imports. `preflight.check` does all of them too.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rlkd.config.schema import Config, DataConfig
from rlkd.data.faults import DataError
from rlkd.data.sources import read_rows
from rlkd.models.found import find
from rlkd.run.tracking import tracking_problems
from rlkd.storage.near import did_you_mean
from rlkd.storage.run_folder import checkpoints

FIRST_ROWS = 1000
"""Rows of a file that are read here; `preflight.check` reads all."""


def first_look(config: Config) -> list[str]:
    """Problems of the run, one line each with its dotted key; empty if none is found."""
    problems = run_directory(config)
    for key, path in [("model.path", config.model.path), *((f"{key}.path", one.path) for key, one in config.teachers)]:
        try:
            find(path)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return problems + _data_files(config) + tracking_problems(config)


def _data_files(config: Config) -> list[str]:
    """The files of data that are not there, and the faults of the first rows of the training data.

    Only of .jsonl files: other sources import other libraries.
    """
    asked = {"data.path": config.data.path}
    if config.eval.path is not None and config.eval.every > 0:
        asked["eval.path"] = config.eval.path
    files = {key: path for key, path in asked.items() if path.endswith(".jsonl") and ":" not in path}
    problems = [f"{key}: no file {path}{did_you_mean(path)}" for key, path in files.items() if not os.path.exists(path)]
    if "data.path" in files and not problems:
        first = config.data.model_copy(update={"limit": min(config.data.limit or FIRST_ROWS, FIRST_ROWS)})
        if faults(first):
            problems += [f"data.path: {line}" for line in faults(config.data)]  # of all rows
    return problems


def faults(data: DataConfig) -> list[str]:
    """The faults of all rows that can be found without a tokenizer, one line each."""
    try:
        for _ in read_rows(data):
            pass
    except DataError as error:
        return error.lines
    return []


def run_directory(config: Config) -> list[str]:
    """What keeps the run from its directory, or keeps it from being written to, one line.

    Only files that a training run writes count, since another rank may just have created the directory."""
    resume, folder = config.run.resume, Path(config.run_dir)
    try:
        above = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    except OSError as error:  # a name that is too long
        return [f"run.dir: {str(folder)[:80]}…: {error.strerror}; choose another run.dir or run.name"]
    if not above.is_dir():
        return [f"run.dir: {above} is a file, where the run's directory {folder} should be; choose another run.dir"]
    try:
        with tempfile.TemporaryFile(dir=above):  # root has all permissions, but /proc takes no file
            pass
    except OSError as error:
        return [
            f"run.dir: {folder} cannot be written, since no file can be made in {above} ({error.strerror}); "
            "choose another run.dir, or correct its permissions"
        ]
    if resume == "never":
        if Path(folder, "metrics.jsonl").exists() or checkpoints(folder):
            return [
                f"run.name: {folder} already has a run in it; continue it by run.resume=auto, or choose another "
                "run.name"
            ]
    elif resume != "auto" and not Path(resume).is_dir():
        names = ", ".join(str(path) for path in checkpoints(folder)[-3:])
        hint = f"; {folder} has {names}" if names else ""
        return [
            f"run.resume: expected never, auto, or the folder of a checkpoint, got {resume}, which does not exist{hint}"
        ]
    return []
