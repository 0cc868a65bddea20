"""Checkpoints between iterations, and the signals that ask for one."""

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
from rlkd.run.export import export_student
from rlkd.storage import atomic
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import checkpoints, iteration_of, save_config
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch

TOGETHER_S = 5.0
"""Under torchrun, signals within as many seconds of the first are the same request: a terminal or a scheduler signals
torchrun and its workers, and torchrun hands on what it gets."""


class Signals(IterationCallback):
    """SIGTERM and SIGINT ask the run to end after the iteration under way; a second one ends it at once.

    The handlers stand in place of Lightning's, which broadcast inside the handler: one signalled rank would hang all.
    Lightning puts the old handlers back after the run.
    """

    def __init__(self) -> None:
        self._asked: float | None = None
        """When the first signal came."""

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._asked > TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def any_rank(self) -> bool:
        """Whether any rank got a signal, so that all leave together. A collective."""
        return distributed.all_reduce([float(self._asked is not None)], "max")[0] > 0


class Checkpoint(IterationCallback):
    """Saves every `checkpoint.every` iterations and at the end of the run, and ends it.

    The run ends at `run.iterations`, or after the iteration in which a signal came.
    """

    def __init__(self, config: Config, loader: RolloutLoader, signals: Signals):
        self.config = config
        self.loader = loader
        self.signals = signals
        self._saved: int | None = None
        """Iterations in the newest checkpoint, or in one that could not be written, which is not tried again; None:
        the run has not begun."""

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        self._saved = self.loader.iteration
        if distributed.rank() == 0:
            self._forget_what_came_later()
        if self.loader.iteration >= self.config.run.iterations:
            self._export(module, self.loader.iteration)  # a run that was ended just before it did
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
            if not signalled:  # else there may be no time: a resumed run does it
                self._export(module, done)
            trainer.should_stop = True

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """A run that cannot go on keeps what it has. All ranks come here together where they stopped together."""
        assert isinstance(pl_module, PolicyModule)
        done = self.loader.iteration
        if not isinstance(exception, RunStopped) or pl_module.updating or self._saved is None or done <= self._saved:
            return
        try:
            self._save(trainer, done)
        except RunStopped as error:
            print(f"stopped, and no checkpoint of iteration {done} either: {error}", file=sys.stderr, flush=True)
            return
        if distributed.rank() == 0:
            print(f"stopped: saved iteration {done}; go on with run.resume=auto", flush=True)

    def _export(self, module: PolicyModule, done: int) -> None:
        """The student, where `checkpoint.export` asks for it. A collective."""
        if self.config.checkpoint.export:
            export_student(module.model, self.config, self.loader.tokenizer, done)

    def _forget_what_came_later(self) -> None:
        """A run that goes on from an older checkpoint replaces the newer ones, as it does their rows.

        They would be taken for its own: kept in place of what it saves, and what `run.resume=auto` goes on from.
        """
        atomic.sweep(Path(self.config.run_dir, "checkpoints"))
        for path in checkpoints(self.config.run_dir):
            if iteration_of(path) > self.loader.iteration:
                print(f"resume: {path} is removed, since the run goes on from iteration {self.loader.iteration}")
                atomic.remove(path)

    def _save(self, trainer: lightning.Trainer, done: int) -> None:
        """Write aside, then rename: what bears a checkpoint's name is whole.

        Raises: RunStopped when there is no room for it; the run's older checkpoints stay.
        """
        folder = Path(self.config.run_dir, "checkpoints")
        final = folder / f"iteration-{done:06d}"
        beside = atomic.partial(final)
        self._saved = done
        needed = distributed.all_reduce([float(_bytes(trainer))])[0]
        distributed.on_rank_zero(lambda: _make_room(folder, beside, needed))
        what = f"the checkpoint of iteration {done}"
        try:
            with writing(what):
                # Where rank 0 alone fails, the others wait for it in there; torchrun ends them with it.
                trainer.save_checkpoint(beside)
            distributed.on_rank_zero(lambda: self._finish(beside, final, what))
        except RunStopped:
            shutil.rmtree(beside, ignore_errors=True)
            raise

    def _finish(self, beside: Path, final: Path, what: str) -> None:
        with writing(what):
            self.loader.save(beside)
            save_config(self.config, beside)
            beside.rename(final)
            for old in checkpoints(self.config.run_dir)[: -self.config.checkpoint.keep]:
                atomic.remove(old)


def _bytes(trainer: lightning.Trainer) -> int:
    """Of this rank's share of what is trained and of the optimizer; what else a checkpoint holds is small."""
    tensors = [p for p in trainer.model.parameters() if p.requires_grad] if trainer.model is not None else []
    for optimizer in trainer.optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    local = [distributed.local_part(t) for t in tensors if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in local)


def _make_room(folder: Path, beside: Path, needed: float) -> None:
    """Raises: RunStopped before anything is written, where the disk is too full."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.sweep(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunStopped(
            f"{folder} has {free / 1e9:.3g} GB free, but the checkpoint {beside.name} takes {needed / 1e9:.3g} GB; "
            "make room, and go on with run.resume=auto"
        )
