"""The last arrow of the line: after each iteration the sampler gets the new weights."""

from __future__ import annotations

import time
from typing import Any

import lightning

from rlkd import distributed
from rlkd.module import PolicyModule
from rlkd.rollout.loader import RolloutLoader
from rlkd.types import Batch


class Publish(lightning.Callback):
    """Opens the left half of the line, publishes weights to its sampler, and closes it.

    Weights leave in `on_train_start`, when a resumed run is restored, and after every iteration. The version is the
    number of iterations completed.
    """

    def __init__(self, loader: RolloutLoader):
        self.loader = loader

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.loader.open()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._publish(pl_module, self.loader.iteration)
        self.loader.check_parity()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._publish(pl_module, batch.iteration + 1)

    def _publish(self, pl_module: lightning.LightningModule, version: int) -> None:
        assert isinstance(pl_module, PolicyModule)
        started = time.perf_counter()
        # Every rank gathers, and every rank's sampler takes part.
        self.loader.policy.publish(pl_module.model.full_weights(), version)
        distributed.barrier()
        pl_module.row["time/publish"] = time.perf_counter() - started

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.loader.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.loader.close()
