"""Reads what a run has written: its configuration and its rows of metrics, of each stage if it has several."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlkd.config.schema import EvalConfig, RunConfig
from rlkd.storage.run_folder import stage_names


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, or of one stage of a run."""

    folder: Path
    config: dict[str, Any]
    """`run` and `eval` have their defaults. References such as ${oc.env:X} may be secrets and are not resolved."""
    config_text: str
    rows: list[dict[str, Any]]
    """The rows of metrics.jsonl, sorted by iteration."""
    notes: list[str]
    """What is unusual about the files, for the page."""

    @property
    def done(self) -> int:
        """Iterations in metrics.jsonl."""
        return int(self.rows[-1]["iteration"]) if self.rows else 0


def read_stages(folder: str | Path) -> list[RunFiles]:
    """The stages of the run in `folder` that have begun, in order; a run without stages is a single one.

    A truncated last line of metrics.jsonl (the run is still writing, or was killed) is left out, with a note.

    Raises: ValueError if a file is missing or a line is invalid; the message names file and line.
    """
    folder = Path(folder)
    folders = [folder / name for name in stage_names(folder)]
    return [_read(each) for each in folders if is_run(each)] or [_read(folder)]


def is_run(folder: Path) -> bool:
    """Whether a run has written rows of metrics to `folder`."""
    return all((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml"))


def _read(folder: Path) -> RunFiles:
    for name in ("metrics.jsonl", "config.yaml"):
        if not (folder / name).is_file():
            raise ValueError(f"expected a run directory, got {folder}, which has no {name}; use runs/<run.name>")
    rows, notes = _rows(folder / "metrics.jsonl")
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    config["run"] = RunConfig().model_dump() | config.get("run", {})
    config["eval"] = EvalConfig().model_dump() | config.get("eval", {})
    return RunFiles(folder, config, text, rows, notes)


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of metrics.jsonl sorted by iteration, and notes about them."""
    notes: list[str] = []
    rows: dict[int, dict[str, Any]] = {}
    repeated: set[int] = set()
    lines = [(at, line) for at, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    for at, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if at == lines[-1][0]:
                notes.append("The last line of metrics.jsonl was cut off and is left out.")
                break
            raise ValueError(f"{path}, line {at}: not JSON ({error}); correct or remove the line") from error
        _check(row, f"{path}, line {at}")
        iteration = row["iteration"]
        if iteration in rows:
            repeated.add(iteration)
        rows[iteration] = rows.get(iteration, {}) | row
    if repeated:
        span = f"{min(repeated)} to {max(repeated)}" if len(repeated) > 1 else f"{min(repeated)}"
        notes.append(f"Iteration {span} has several rows (a resumed run repeats some); the last ones are shown.")
    return [rows[iteration] for iteration in sorted(rows)], notes


def _check(row: Any, where: str) -> None:
    """Raises: ValueError unless `row` is an object of numbers with an iteration."""
    fix = "correct or remove the line"
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected one JSON object, got {row!r:.60}; {fix}")
    if type(row.get("iteration")) is not int:
        raise ValueError(f"{where}: expected an integer as iteration, got {row.get('iteration')!r}; {fix}")
    for key, value in row.items():
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{where}: expected a number or null as {key}, got {value!r:.60}; {fix}")
