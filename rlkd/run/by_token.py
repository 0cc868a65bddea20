"""Writes what the trainer found of each token beside the rollouts: its log-prob, and the entropy before it."""

from __future__ import annotations

import lightning

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.pipeline.rollout_files import write_by_token
from rlkd.storage.disk_errors import writing
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch


class ByToken(IterationCallback):
    """Writes `tokens/*.npz` after an iteration whose rollouts are written."""

    phase = "dump"

    def __init__(self, config: Config):
        self.config = config

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Write the file of this rank. A collective. Raises: RunStopped on a disk error."""

        def act() -> None:
            with writing(f"tokens/ of iteration {batch.iteration + 1}"):
                write_by_token(self.config, batch, module.by_token)

        distributed.on_every_rank(act)
