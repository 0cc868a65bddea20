"""The last arrow of the line: after each iteration the sampler gets the new weights."""

from __future__ import annotations

import time
from pathlib import Path

import lightning

from rlkd import distributed
from rlkd.pipeline.loader import RolloutLoader
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch


class Publish(IterationCallback):
    """Opens the left half of the line, publishes weights to its sampler, and closes it.

    Weights leave in `on_train_start`, when a resumed run is restored, and after every iteration. The version is the
    number of iterations completed.
    """

    def __init__(self, loader: RolloutLoader):
        self.loader = loader

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.loader.open()

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        if trainer.ckpt_path is not None:
            self.loader.restore(Path(trainer.ckpt_path))
        self._publish(module, self.loader.iteration)
        self.loader.check_parity()

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        self._publish(module, batch.iteration + 1)

    def _publish(self, module: PolicyModule, version: int) -> None:
        started = time.perf_counter()
        # Every rank gathers, and every rank's sampler takes part.
        student, loader = module.model, self.loader
        config = loader.config
        weights = {} if config.publishes_adapter and not loader.teacher_follows else student.full_weights()
        served = None
        if config.publishes_adapter:
            served = student.adapter_weights()
        elif config.rollout.backend == "vllm":
            # Unfused experts are a copy of most of the model. The file engine writes on rank 0 alone; the others send.
            needed = distributed.rank() == 0 or config.rollout.server.weight_sync != "file"
            served = distributed.on_every_rank(lambda: student.loader_weights(weights) if needed else {})
        loader.publish(weights, version, served)
        distributed.barrier()
        module.row["time/publish"] = time.perf_counter() - started

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.loader.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.loader.close()
