"""Checkpoints between iterations, and the signals that ask for one."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import FrameType

import lightning

from rlkd import distributed
from rlkd.config import Config
from rlkd.export import export
from rlkd.iteration_callback import IterationCallback
from rlkd.module import PolicyModule
from rlkd.resume import checkpoints, save_config
from rlkd.rollout.loader import RolloutLoader
from rlkd.types import Batch


class Signals(IterationCallback):
    """SIGTERM and SIGINT ask the run to end after the iteration under way; a second Ctrl-C ends it at once.

    The handlers stand in place of Lightning's, which broadcast inside the handler: one signalled rank would hang all.
    Further SIGTERMs change nothing, since a scheduler and torchrun may well send one each. Lightning puts the old
    handlers back after the run.
    """

    def __init__(self) -> None:
        self._seen = False

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._seen and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._seen = True

    def any_rank(self) -> bool:
        """Whether any rank got a signal, so that all leave together. A collective."""
        return distributed.all_reduce([float(self._seen)], "max")[0] > 0


class Checkpoint(IterationCallback):
    """Saves every `checkpoint.every` iterations and at the end of the run, and ends it.

    The run ends at `run.iterations`, or after the iteration in which a signal came.
    """

    def __init__(self, config: Config, loader: RolloutLoader, signals: Signals):
        self.config = config
        self.loader = loader
        self.signals = signals

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        if self.loader.iteration >= self.config.run.iterations:
            trainer.should_stop = True

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        done = batch.iteration + 1
        signalled = self.signals.any_rank()
        ending = signalled or done >= self.config.run.iterations
        every = self.config.checkpoint.every
        if ending or (every and done % every == 0):
            self._save(trainer, done)
        if signalled and distributed.rank() == 0:
            print(f"signal: saved iteration {done}; go on with run.resume=auto", flush=True)
        if ending:
            if self.config.checkpoint.export and not signalled:
                weights = module.model.full_weights()
                if distributed.rank() == 0:
                    folder = Path(self.config.run_dir, "hf")
                    export(weights, module.model.hf.config, self.loader.tokenizer, self.config.model, folder)
            trainer.should_stop = True

    def _save(self, trainer: lightning.Trainer, done: int) -> None:
        """Write aside, then rename: what bears a checkpoint's name is whole."""
        folder = Path(self.config.run_dir, "checkpoints")
        final = folder / f"iteration-{done:06d}"
        beside = folder / f".iteration-{done:06d}.partial"
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(beside, ignore_errors=True)
        distributed.barrier()
        trainer.save_checkpoint(beside)
        self.loader.save(beside)
        distributed.barrier()
        if distributed.rank() == 0:
            save_config(self.config, beside)
            shutil.rmtree(final, ignore_errors=True)
            beside.rename(final)
            for old in checkpoints(self.config.run_dir)[: -self.config.checkpoint.keep]:
                shutil.rmtree(old)
        distributed.barrier()
