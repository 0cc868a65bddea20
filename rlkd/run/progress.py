"""The console during training: a row of what matters for each iteration, and on a terminal a bar with the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

import lightning
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.console import console
from rlkd.reporting.metric_reference import CONSOLE, METRICS
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch

_REPEATED = 25
"""Rows of the table after which its head is printed again."""


def shown(row: Mapping[str, float]) -> dict[str, str]:
    """The metrics for the console, formatted: those of CONSOLE that the row has."""
    return {name: _formatted(name, row[name]) for name in CONSOLE if name in row}


def _formatted(name: str, value: float) -> str:
    if METRICS[name].share:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Progress(IterationCallback):
    """Prints each iteration: a line with names on an output that is not a terminal, else a row of a table."""

    phase = "log"

    def __init__(self, config: Config):
        self._iterations = config.run.iterations
        self._console = console()
        self._bar: RichProgress | None = None
        self._columns: list[str] = []
        self._rows = 0
        self._began = 0.0
        """The time before the first iteration of this process."""

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Show the bar."""
        self._began, self._rows = time.perf_counter(), 0
        if distributed.rank() == 0 and self._console.is_terminal:
            columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
            self._bar = RichProgress(*columns, console=self._console, transient=True, refresh_per_second=2)
            self._bar.add_task("", total=self._iterations, left="")
            self._bar.start()

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Print the iteration."""
        if distributed.rank() != 0:
            return
        done, self._rows = batch.iteration + 1, self._rows + 1
        left = (time.perf_counter() - self._began) / self._rows * (self._iterations - done)
        texts = shown(module.row)
        if self._bar is None:
            metrics = "  ".join(f"{name} {value}" for name, value in texts.items())
            print(f"iteration {done}/{self._iterations}  {metrics}  left {_clock(left)}", flush=True)
            return
        new = [name for name in texts if name not in self._columns]
        self._columns = [name for name in CONSOLE if name in (*self._columns, *new)]
        if new or self._rows % _REPEATED == 1:
            self._console.print("iteration  " + "  ".join(f"{name:>9}" for name in self._columns), style="dim")
        cells = "  ".join(f"{texts.get(name, ''):>{max(9, len(name))}}" for name in self._columns)
        self._console.print(f"{done:>9}  {cells}", markup=False)
        self._bar.update(self._bar.task_ids[0], completed=done, left=f"{_clock(left)} left")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remove the bar."""
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar after an error too."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
