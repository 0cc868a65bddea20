"""Exports the student of the best evaluation, and notices when evaluations get no better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.pipeline.loader import RolloutLoader
from rlkd.run.export import BEST, export_student
from rlkd.storage.run_folder import export_record
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch


class Best(IterationCallback):
    """Keeps the student with the highest `checkpoint.best` in `<run>/best`; of equal ones the first.

    For `run.stop_after` it counts the evaluations since the highest one. That is part of a checkpoint, so a resumed run
    ends where a straight one does.
    """

    phase = "checkpoint"

    def __init__(self, config: Config, loader: RolloutLoader, heldout: int):
        """`heldout`: the number of prompts that evaluations measure, for the model card."""
        self.config = config
        self.loader = loader
        self.heldout = heldout
        self.metric = config.checkpoint.best
        self.highest: float | None = None
        self.at = 0
        """The iterations after which it was evaluated."""
        self.waited = 0
        """Evaluations since then."""
        self._on_disk: float | None = None
        """The metric of the student in `<run>/best`. If the run was killed, it may be of an iteration that is repeated,
        and stays unless that or another is better."""

    @property
    def gives_up(self) -> bool:
        """Whether `run.stop_after` ends the run now."""
        limit = self.config.run.stop_after
        return limit is not None and self.waited >= limit

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "highest": self.highest, "at": self.at, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["metric"] == self.metric:  # otherwise begin anew
            self.highest, self.at, self.waited = state["highest"], state["at"], state["waited"]

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Look at the first evaluation, or find what a resumed run has exported."""
        if self.metric is None:
            return
        if self.loader.iteration == 0:
            self._look(module, 0)
        else:
            best = Path(self.config.run_dir, BEST)
            self._on_disk = distributed.broadcast(export_record(best).get(self.metric))

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Look at the evaluation of the iteration, if there is one."""
        if self.metric is not None:
            self._look(module, batch.iteration + 1)

    def _look(self, module: PolicyModule, done: int) -> None:
        """A collective: the metrics are the same on all ranks."""
        assert self.metric is not None
        if self.metric not in module.row:
            return
        value = module.row[self.metric]
        if self.highest is None or value > self.highest:
            self.highest, self.at, self.waited = value, done, 0
        else:
            self.waited += 1
        if self._on_disk is None or value > self._on_disk:
            self._on_disk = value
            known: dict[str, float] = {self.metric: value}
            export_student(module.model, self.config, self.loader.tokenizer, done, self.heldout, known, BEST)
        if self.gives_up and distributed.rank() == 0:
            print(
                f"run.stop_after: {self.metric} was not above its {self.highest:.4g} of iteration {self.at} in the "
                f"last {self.waited} evaluations, so the run ends after iteration {done}",
                flush=True,
            )
