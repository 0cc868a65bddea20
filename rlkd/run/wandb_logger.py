"""Logs to Weights & Biases, and to TensorBoard, through Lightning's loggers: metrics, the configuration, samples."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.distributed import RunStopped
from rlkd.reporting.samples import newest_rollouts
from rlkd.run.model_card import code_version
from rlkd.storage import atomic
from rlkd.storage.run_folder import iteration_of
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch

COLUMNS = ("prompt", "completion", "answer", "reward", "advantage", "finish_reason")
"""The columns of a table of samples."""


def loggers(config: Config, recipe: str | None = None, checkpoint: Path | None = None) -> list[Logger]:
    """The loggers for `log.wandb` and `log.tensorboard`.

    Args:
        recipe: the name of the whole run, if this is one of its stages.
        checkpoint: what the run continues from. TensorBoard hides what was logged of later iterations, unless its
            folder was renamed.

    Raises: RunStopped, see `wandb_loggers`.
    """
    found = wandb_loggers(config, recipe)
    if config.log.tensorboard:
        named = checkpoint is not None and checkpoint.name.startswith("iteration-")
        first = iteration_of(checkpoint) + 1 if checkpoint is not None and named else 0
        found.append(TensorBoardLogger(config.run_dir, name="", version="tensorboard", purge_step=first))
    return found


def wandb_loggers(config: Config, recipe: str | None) -> list[Logger]:
    """The logger for `log.wandb`, with the run's `config.yaml` as config; a resumed run continues the same W&B run.

    If W&B cannot be reached, a warning is printed and the run logs offline.

    Raises: RunStopped if W&B rejects the run, for example without an API key.
    """
    if config.log.wandb == "off":
        return []
    if config.log.wandb == "offline" or int(os.environ.get("RANK", "0")) != 0:
        return [_logger(config, recipe, offline=config.log.wandb == "offline")]
    import wandb

    logger = _logger(config, recipe, offline=False)
    try:
        assert logger.experiment is not None  # connects now
    except wandb.errors.CommError as error:
        wandb.teardown()  # otherwise its service treats the run's id as taken
        reason = " ".join(str(error).split())[:200]
        folder = Path(config.run_dir, "wandb")
        print(
            f"log.wandb: no connection ({reason}); logging offline, upload later with: wandb sync {folder}/offline-*",
            file=sys.stderr,
            flush=True,
        )
        return [_logger(config, recipe, offline=True)]
    except wandb.errors.UsageError as error:
        raise RunStopped(f"log.wandb: {' '.join(str(error).split())}") from error
    return [logger]


def finish(config: Config) -> None:
    """End the W&B run, if there is one; it prints how to upload one that is offline. The next stage gets its own."""
    if config.log.wandb != "off":
        import wandb

        wandb.finish()


def _logger(config: Config, recipe: str | None, *, offline: bool) -> WandbLogger:
    identity = Path(config.run_dir, "wandb_id")
    if int(os.environ.get("RANK", "0")) == 0 and not identity.exists():
        identity.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(identity, os.urandom(4).hex().encode())
    logger = WandbLogger(
        name=config.run.name if recipe is None else f"{recipe}/{config.run.name}",
        group=recipe or config.run.name,
        job_type=config.algorithm.name if recipe is None else config.run.name,
        project=config.log.project,
        save_dir=config.run_dir,
        offline=offline,
        id=identity.read_text() if identity.exists() else None,
        resume="allow",
        config=_settings(config),
    )
    logger._wandb_init.pop("anonymous", None)  # W&B warns that it has no effect, even if it is None
    return logger


def _settings(config: Config) -> dict[str, Any]:
    """The run's configuration from its `config.yaml`, in which references such as ${oc.env:X} are not resolved, since
    their values may be secrets."""
    path = Path(config.run_dir, "config.yaml")
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return settings | {"rlkd": code_version()}


class Samples(IterationCallback):
    """Logs a table of a few rollouts to W&B, as often as `log.samples_every` tells, and after the last iteration.

    The rollouts are of the newest file (`log.rollouts_every`). `rollouts/` has all files.
    """

    phase = "log"

    def __init__(self, config: Config):
        self.config = config

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Log the table if it is due."""
        done, every = batch.iteration + 1, self.config.log.samples_every or self.config.eval.every
        due = done == self.config.run.iterations or (every > 0 and done % every == 0)
        if not due or distributed.rank() != 0:
            return
        rollouts = newest_rollouts(Path(self.config.run_dir, "rollouts"))
        rows = [[rollout.get("iteration"), *(_cell(rollout.get(name)) for name in COLUMNS)] for rollout in rollouts]
        for logger in trainer.loggers:
            if rows and isinstance(logger, WandbLogger):
                logger.log_table("samples", columns=["iteration", *COLUMNS], data=rows, step=done)


def _cell(value: Any) -> Any:
    """A value for a table. Half a surrogate pair, which a completion may contain, is escaped for UTF-8."""
    return value.encode("utf-8", errors="backslashreplace").decode() if isinstance(value, str) else value
