"""Weights & Biases, through Lightning's logger: figures, the run's configuration, and tables of samples."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.pytorch.loggers import Logger, WandbLogger
from pydantic import ValidationError

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.distributed import RunStopped
from rlkd.reporting.report_page import newest_rollouts
from rlkd.storage import atomic
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch

COLUMNS = ("prompt", "completion", "answer", "reward", "advantage", "finish_reason")
"""Of a table of samples."""


def tracking_problems(config: Config) -> list[str]:
    """What W&B would refuse of its own environment variables, one line each."""
    if config.log.wandb == "off":
        return []
    import wandb

    try:
        wandb.Settings().update_from_env_vars(dict(os.environ))
    except wandb.errors.UsageError as error:
        return [f"log.wandb: W&B says: {' '.join(str(error).split())}; correct its environment variable or unset it"]
    except ValidationError as error:
        names = [(f"WANDB_{str(fault['loc'][0]).upper()}", fault) for fault in error.errors()]
        shown = {name: "" if "KEY" in name else f"got {fault['input']!r}; " for name, fault in names}
        return [
            f"{name}: {shown[name]}W&B says: {fault['msg']}; correct the variable or unset it, or set log.wandb: off"
            for name, fault in names
        ]
    return []


def loggers(config: Config) -> list[Logger]:
    """What `log.wandb` says, with the run's `config.yaml` as its config; a resumed run goes on in the same W&B run.

    A W&B that cannot be reached does not end a run, nor hold it up: it is told, and this run is logged offline.

    Raises: RunStopped when W&B refuses, for want of an API key, say.
    """
    if config.log.wandb == "off":
        return []
    if config.log.wandb == "offline" or int(os.environ.get("RANK", "0")) != 0:
        return [_logger(config, offline=config.log.wandb == "offline")]
    import wandb

    logger = _logger(config, offline=False)
    try:
        assert logger.experiment is not None  # connects now
    except wandb.errors.CommError as error:
        wandb.teardown()  # else its service holds the run's id as taken
        said = " ".join(str(error).split())[:200]
        folder = Path(config.run_dir, "wandb")
        print(
            f"log.wandb: no connection ({said}); logging offline, upload later by: wandb sync {folder}/offline-*",
            file=sys.stderr,
            flush=True,
        )
        return [_logger(config, offline=True)]
    except wandb.errors.UsageError as error:
        raise RunStopped(f"log.wandb: {' '.join(str(error).split())}") from error
    return [logger]


def finish(config: Config) -> None:
    """End the W&B run, if there is one: the next stage is a run of its own."""
    if config.log.wandb != "off":
        import wandb

        wandb.finish()


def _logger(config: Config, *, offline: bool) -> WandbLogger:
    identity = Path(config.run_dir, "wandb_id")
    if int(os.environ.get("RANK", "0")) == 0 and not identity.exists():
        identity.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(identity, os.urandom(4).hex().encode())
    return WandbLogger(
        name=config.run.name,
        project=config.log.project,
        save_dir=config.run_dir,
        offline=offline,
        id=identity.read_text() if identity.exists() else None,
        resume="allow",
        config=_settings(config),
    )


def _settings(config: Config) -> dict[str, Any]:
    """The run's configuration as its `config.yaml` has it, where references such as ${oc.env:X} stay as written: what
    they stand for may be a secret."""
    path = Path(config.run_dir, "config.yaml")
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return settings


class Samples(IterationCallback):
    """A table of a few rollouts in W&B, wherever there is an evaluation and after the last iteration.

    They are those of the report: of the newest dump (`log.rollouts_every`), so the whole run's are in `rollouts/`.
    """

    def __init__(self, config: Config):
        self.config = config

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        done, every = batch.iteration + 1, self.config.eval.every
        due = done == self.config.run.iterations or (every > 0 and done % every == 0)
        if not due or distributed.rank() != 0:
            return
        rollouts, _ = newest_rollouts(Path(self.config.run_dir, "rollouts"))
        rows = [[rollout.get("iteration"), *(_cell(rollout.get(name)) for name in COLUMNS)] for rollout in rollouts]
        for logger in trainer.loggers:
            if rows and isinstance(logger, WandbLogger):
                logger.log_table("samples", columns=["iteration", *COLUMNS], data=rows, step=done)


def _cell(value: Any) -> Any:
    """A column of W&B's has one type; half of a surrogate pair, which a completion may hold, is no UTF-8."""
    return value.encode("utf-8", errors="backslashreplace").decode() if isinstance(value, str) else value
