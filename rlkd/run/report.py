"""Writes report.html of a run, and of all stages of a recipe, at each evaluation."""

from __future__ import annotations

from pathlib import Path

import lightning

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.reporting.report_page import write_report
from rlkd.reporting.run_files import is_run
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import stage_names
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch


def write_reports(config: Config) -> Path:
    """Write the page of the run and, if it is a stage, that of all stages. Returns: the path of the last one.

    Raises: RunStopped on a disk error.
    """
    with writing(f"run.dir: {config.run_dir}/report.html"):
        path = write_report(config.run_dir)
        if config.run.name in stage_names(config.run.dir):
            path = write_report(config.run.dir)
    return path


class Report(IterationCallback):
    """Keeps the page of the run up to date: at the start and at every evaluation but the last.

    `run` writes the last one, when all samples are on the disk. A run by a Trainer of the user's own has no
    config.yaml, and no page.
    """

    phase = "log"

    def __init__(self, config: Config):
        self.config = config

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Write the page with the first evaluation."""
        self._write()

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Write the page if it is due."""
        done, every = batch.iteration + 1, self.config.eval.every
        if every and done % every == 0 and done < self.config.run.iterations:
            self._write()

    def _write(self) -> None:
        distributed.on_rank_zero(lambda: is_run(Path(self.config.run_dir)) and write_reports(self.config))
