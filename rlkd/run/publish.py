"""Sends the new weights to the sampler after each iteration."""

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
        # Gathering and publishing are collectives, so every rank takes part.
        student, loader = module.model, self.loader
        config = loader.config
        weights = {} if config.publishes_adapter and not loader.teacher_follows else student.full_weights()
        served = None
        if config.publishes_adapter:
            served = student.adapter_weights()
        elif config.rollout.backend == "vllm":
            # Unfusing experts copies most of the model, so do it only on ranks that use it: with weight_sync file only
            # rank 0 writes; otherwise every rank sends.
            needed = distributed.rank() == 0 or config.rollout.server.weight_sync != "file"
            served = distributed.on_every_rank(lambda: student.loader_weights(weights) if needed else {})
        loader.publish(weights, version, served)
        distributed.barrier()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close the loader at the end of the run."""
        self.loader.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the loader after an error too."""
        self.loader.close()
