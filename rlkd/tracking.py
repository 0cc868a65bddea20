"""Weights & Biases, through Lightning's logger."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger

from rlkd import whole
from rlkd.config import Config
from rlkd.distributed import RunStopped


def loggers(config: Config) -> list[Logger]:
    """What `log.wandb` says; a resumed run goes on in the same W&B run.

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
        whole.write(identity, os.urandom(4).hex().encode())
    return WandbLogger(
        name=config.run.name,
        project=config.log.project,
        save_dir=config.run_dir,
        offline=offline,
        id=identity.read_text() if identity.exists() else None,
        resume="allow",
    )
