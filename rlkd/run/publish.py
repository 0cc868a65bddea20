"""Sends the new weights to the sampler after each iteration."""

from __future__ import annotations

import time
from pathlib import Path

import lightning

from rlkd import console, distributed
from rlkd.pipeline.loader import RolloutLoader
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch


class Publish(IterationCallback):
    """Opens the rollout loader, publishes weights to its sampler, and closes it.

    It publishes in `on_train_start`, after a resumed run has been restored, and after every iteration. The version is
    the number of completed iterations.
    """

    phase = "publish"

    def __init__(self, loader: RolloutLoader):
        self.loader = loader

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Open the loader: sampler, teacher and reward workers."""
        self.loader.open()

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Restore a resumed run, publish the first weights, and run the parity check."""
        if trainer.ckpt_path is not None:
            self.loader.restore(Path(trainer.ckpt_path))
        progress = self.loader.config.log.progress
        with console.phase("publishing the weights", progress):
            self._publish(module, self.loader.iteration)
        self.loader.check_parity()

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Publish the new weights."""
        self._publish(module, batch.iteration + 1)

    def _publish(self, module: PolicyModule, version: int) -> None:
        started = time.perf_counter()
        self.loader.written()
        written = time.perf_counter()
        self.loader.join()
        joined = time.perf_counter()
        module.seconds["dump"] += written - started
        module.seconds["join"] += joined - written
        module.seconds["publish"] -= joined - started
        self.loader.publish(module.model, version)
        distributed.barrier()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close the loader at the end of the run."""
        self.loader.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the loader after an error too."""
        self.loader.close()
