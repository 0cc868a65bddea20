"""Lightning's batch hooks under the names that they have here: a batch is an iteration."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import lightning

from rlkd.training.module import PolicyModule
from rlkd.types import Batch


class IterationCallback(lightning.Callback):
    """Base of our callbacks: typed, and without Lightning's unused arguments."""

    phase: ClassVar[str] = "callbacks"
    """The time that its methods take is counted under this name in `PolicyModule.seconds`."""

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Called before the first iteration, after a resumed run was restored."""

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Called after the last update on `batch`; `module.row` has its metrics."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        started = time.perf_counter()
        self.run_started(trainer, pl_module)
        pl_module.seconds[self.phase] += time.perf_counter() - started

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        started = time.perf_counter()
        self.iteration_ended(trainer, pl_module, batch)
        pl_module.seconds[self.phase] += time.perf_counter() - started
