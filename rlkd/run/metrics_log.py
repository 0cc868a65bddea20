"""Writes a run's metrics to metrics.jsonl, and the loggers of the Trainer."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.distributed import RunStopped
from rlkd.pipeline.loader import RolloutLoader
from rlkd.storage import atomic
from rlkd.storage.disk_errors import writing
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch

PHASES = ("transfer", "dump", "join", "publish", "evaluate", "log", "checkpoint")
"""What is done between two rows outside `training_step`; writing a row and a checkpoint count in the row after."""
WORK = ("rollout", "reward", "teacher", "train", "join", "publish", "evaluate", "checkpoint")
"""What a run is for. The rest of an iteration is overhead."""


class RunLog(IterationCallback):
    """Writes one row per iteration to `<run>/metrics.jsonl` and to every logger of the Trainer, at step = iteration.

    Row 0 has the first evaluation. A resumed run first drops the rows after its checkpoint.
    """

    phase = "log"

    def __init__(self, config: Config, loader: RolloutLoader):
        self.config = config
        self.loader = loader
        self.path = Path(config.run_dir, "metrics.jsonl")
        self._last = 0.0
        self._written = 0
        """The iteration of the last row."""

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Drop rows of iterations that are repeated, and write the first evaluation."""
        self._last = time.perf_counter()
        module.seconds.clear()
        if distributed.rank() == 0:
            self._keep_rows_up_to(self.loader.iteration)
        evaluated = {k: v for k, v in module.row.items() if k.startswith("eval/")}
        if evaluated:
            self._write(trainer, {"iteration": 0} | evaluated)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the batch was complete."""
        assert isinstance(pl_module, PolicyModule)
        pl_module.seconds["transfer"] += time.perf_counter() - self.loader.made

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """If the run stopped after an iteration's updates but before its row was written, write it now, since the
        checkpoint of the iteration is saved too."""
        assert isinstance(pl_module, PolicyModule)
        unwritten = pl_module.row.get("iteration", 0) > self._written
        if isinstance(exception, RunStopped) and unwritten and not pl_module.updating:
            self._log(trainer, pl_module)

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Write the row of the iteration."""
        self._log(trainer, module)

    def _log(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        now = time.perf_counter()
        row = module.row
        row |= {f"time/{phase}": module.seconds[phase] for phase in PHASES}
        row["time/total"] = now - self._last
        row["time/overhead"] = row["time/total"] - sum(row.get(f"time/{phase}", 0.0) for phase in WORK)
        module.seconds.clear()
        # An algorithm that learns from given completions, such as SFT, generates no tokens.
        row["tokens_per_s"] = (row["tokens/generated"] or row["tokens/trained"]) / row["time/total"]
        self._last = now
        self._written = int(row["iteration"])
        self._write(trainer, row)

    def _write(self, trainer: lightning.Trainer, row: dict[str, float]) -> None:
        distributed.on_rank_zero(lambda: self._append(row))
        for logger in trainer.loggers:  # they log only on rank 0
            logger.log_metrics(row, step=int(row["iteration"]))

    def _append(self, row: dict[str, float]) -> None:
        """Append one line. A resumed run drops a truncated last line. Raises: RunStopped on a disk error."""
        with writing(str(self.path)), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")

    def _keep_rows_up_to(self, iteration: int) -> None:
        """Truncate metrics.jsonl to the iterations of the restored state; to nothing for a new run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.exists() and iteration > 0:
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["iteration"] <= iteration:
                    kept.append(line)
        atomic.write(self.path, "".join(kept).encode())
