"""The results of a run, for notebooks: `rlkd.runs.load("runs/x").metrics["reward/mean"].plot()`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from rlkd.config.schema import Config
from rlkd.config_file import load as load_config


@dataclass(frozen=True)
class Run:
    """A run that has ended or is under way."""

    folder: Path
    metrics: pandas.DataFrame
    """One row for each row of metrics.jsonl, by iteration. NaN: that iteration did not measure the metric."""

    @property
    def config(self) -> Config:
        """The configuration in config.yaml. Raises: ConfigError, one line for each key that is no longer valid."""
        return load_config([str(self.folder / "config.yaml")]).config

    def samples(self, iteration: int | None = None) -> pandas.DataFrame:
        """The rollouts of an iteration, one per row; by default, of the last one that was written.

        Raises: ValueError, one line, if there are none (`log.rollouts_every` selects the iterations).
        """
        name = "*" if iteration is None else f"{iteration:06d}"
        files = sorted(self.folder.glob(f"rollouts/{name}-rank*.jsonl"))
        if not files:
            which = "" if iteration is None else f" of iteration {iteration}"
            raise ValueError(f"{self.folder}: no rollouts{which}; log.rollouts_every selects which are written")
        newest = [file for file in files if file.name[:6] == files[-1].name[:6]]
        return pandas.DataFrame([row for file in newest for row in _rows(file)])


def load(folder: str | Path) -> Run:
    """The run in `folder`, which is <run.dir>/<run.name>, and for a stage <run.dir>/<run.name>/<stage>.

    Raises: ValueError, one line, if no run has written metrics there.
    """
    file = Path(folder, "metrics.jsonl")
    if not file.is_file():
        raise ValueError(f"{folder}: expected the folder of a run, got no metrics.jsonl in it")
    rows = pandas.DataFrame(list(_rows(file)))
    return Run(Path(folder), rows if rows.empty else rows.set_index("iteration").astype(float))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file to which a run may be appending."""
    with open(file, encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.endswith("\n"))
