"""Saves checkpoints between iterations, and handles the signals that end a run with one."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import lightning
from torch import Tensor

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.distributed import RunStopped
from rlkd.pipeline.loader import RolloutLoader
from rlkd.run.best import Best
from rlkd.run.export import export_student
from rlkd.run.resume import as_run
from rlkd.storage import atomic
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import checkpoints, iteration_of, save_config
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch

SAME_REQUEST_S = 5.0
"""Under torchrun, signals within this many seconds of the first one count as the same request: a terminal or a
scheduler signals torchrun and its workers, and torchrun forwards its own signal to the workers."""


class Signals(IterationCallback):
    """SIGTERM and SIGINT end the run after the current iteration; a second signal ends it immediately.

    These handlers replace Lightning's, which broadcast inside the handler: a signal to only one rank would hang all
    ranks. Lightning restores the old handlers after the run.
    """

    def __init__(self) -> None:
        self._asked: float | None = None
        """The time of the first signal."""

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Install the handlers."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._asked > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def any_rank(self) -> bool:
        """Whether any rank got a signal, so that all ranks stop together. A collective."""
        return distributed.all_reduce([float(self._asked is not None)], "max")[0] > 0


class Checkpoint(IterationCallback):
    """Saves every `checkpoint.every` iterations and at the end of the run, and ends the run.

    The run ends at `run.iterations`, where `run.stop_after` ends it, or after the iteration in which a signal arrived.
    """

    phase = "checkpoint"

    def __init__(self, config: Config, loader: RolloutLoader, signals: Signals, best: Best, heldout: int):
        """`heldout`: the number of prompts that evaluations measure, for the model card."""
        self.config = config
        self.loader = loader
        self.signals = signals
        self.best = best
        self.heldout = heldout
        self._saved: int | None = None
        """Iterations in the newest checkpoint. A checkpoint that could not be written counts too, and is not retried.
        None before the run has started."""

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Remove checkpoints newer than the resumed one; end a run that has no iterations left."""
        self._saved = self.loader.iteration
        if distributed.rank() == 0:
            self._remove_later_checkpoints()
        if self.loader.iteration >= self.config.run.iterations or self.best.gives_up:
            self._export(module, self.loader.iteration)  # in case the run was stopped before its export
            trainer.should_stop = True

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Save if a checkpoint is due, and end the run if it is complete or was signalled."""
        done = batch.iteration + 1
        signalled = self.signals.any_rank()
        ending = signalled or done >= self.config.run.iterations or self.best.gives_up
        every = self.config.checkpoint.every
        if ending or (every and done % every == 0):
            self._save(trainer, done)
        if signalled and distributed.rank() == 0:
            print(f"signal: saved iteration {done}; continue with run.resume=auto", flush=True)
        if ending:
            if not signalled:  # after a signal there may be no time to export; a resumed run does it
                self._export(module, done)
            trainer.should_stop = True

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save a checkpoint after RunStopped. If all ranks stopped together, all call this together."""
        assert isinstance(pl_module, PolicyModule)
        done = self.loader.iteration
        if not isinstance(exception, RunStopped) or pl_module.updating or self._saved is None or done <= self._saved:
            return
        try:
            self._save(trainer, done)
        except RunStopped as error:
            print(f"stopped; saving a checkpoint of iteration {done} also failed: {error}", file=sys.stderr, flush=True)
            return
        if distributed.rank() == 0:
            print(f"stopped: saved iteration {done}; continue with run.resume=auto", flush=True)

    def _export(self, module: PolicyModule, done: int) -> None:
        """Export the student if `checkpoint.export` is set. A collective."""
        if self.config.checkpoint.export:
            known = {"waited": self.best.waited}
            export_student(module.model, self.config, self.loader.tokenizer, done, self.heldout, known)

    def _remove_later_checkpoints(self) -> None:
        """Remove checkpoints newer than the one that the run resumes from, as `RunLog` does with their rows.

        Otherwise they would count as this run's: `checkpoint.keep` would keep them instead of the run's own, and
        `run.resume=auto` would resume from them.
        """
        atomic.sweep(Path(self.config.run_dir, "checkpoints"))
        for path in checkpoints(self.config.run_dir):
            if iteration_of(path) > self.loader.iteration:
                print(f"resume: removing {path}, since the run resumes from iteration {self.loader.iteration}")
                atomic.remove(path)

    def _save(self, trainer: lightning.Trainer, done: int) -> None:
        """Write to a temporary folder and then rename it, so that a checkpoint under its final name is complete.

        Raises: RunStopped if the disk has no room for it. The run's older checkpoints stay.
        """
        folder = Path(self.config.run_dir, "checkpoints")
        final = folder / f"iteration-{done:06d}"
        partial = atomic.partial(final)
        self._saved = done
        needed = distributed.all_reduce([float(_bytes(trainer))])[0]
        distributed.on_rank_zero(lambda: _check_room(folder, partial, needed))
        what = f"the checkpoint of iteration {done}"
        try:
            with writing(what):
                # If only rank 0 fails, the others wait for it inside; torchrun then stops them too.
                trainer.save_checkpoint(partial)
            distributed.on_every_rank(lambda: self._save_rollouts(partial, what))
            distributed.on_rank_zero(lambda: self._finish(partial, final, what))
        except RunStopped:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _save_rollouts(self, partial: Path, what: str) -> None:
        with writing(what):
            self.loader.save_rollouts(partial)

    def _finish(self, partial: Path, final: Path, what: str) -> None:
        """Add the small files, rename the folder, and remove checkpoints beyond `checkpoint.keep`."""
        with writing(what):
            self.loader.save(partial)
            save_config(as_run(self.config), partial)
            partial.rename(final)
            for old in checkpoints(self.config.run_dir)[: -self.config.checkpoint.keep]:
                atomic.remove(old)


def _bytes(trainer: lightning.Trainer) -> int:
    """The size of this rank's part of trained parameters and optimizer; the rest of a checkpoint is small."""
    tensors = [p for p in trainer.model.parameters() if p.requires_grad] if trainer.model is not None else []
    for optimizer in trainer.optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    local = [distributed.local_part(t) for t in tensors if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in local)


def _check_room(folder: Path, partial: Path, needed: float) -> None:
    """Remove leftovers of interrupted saves, and check the free disk space before anything is written.

    Raises: RunStopped if the disk has less than `needed` bytes free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic.sweep(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunStopped(
            f"{folder} has {free / 1e9:.3g} GB free, but the checkpoint {partial.name} takes {needed / 1e9:.3g} GB; "
            "free some space, then continue with run.resume=auto"
        )
