"""What Weights & Biases would reject, found before the run. Imports no torch."""

from __future__ import annotations

import importlib.util
import os

from pydantic import ValidationError

from rlkd.config.schema import Config


def tracking_problems(config: Config) -> list[str]:
    """The values of W&B's own environment variables that W&B would reject, one line each, or a missing TensorBoard."""
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        return [
            "log.tensorboard: expected the package tensorboard, which is not installed; pip install 'rlkd[tensorboard]'"
        ]
    if config.log.wandb == "off":
        return []
    import wandb

    try:
        wandb.Settings().update_from_env_vars(dict(os.environ))
    except wandb.errors.UsageError as error:
        return [f"log.wandb: W&B: {' '.join(str(error).split())}; correct its environment variable or unset it"]
    except ValidationError as error:
        names = [(f"WANDB_{str(fault['loc'][0]).upper()}", fault) for fault in error.errors()]
        shown = {name: "" if "KEY" in name else f"got {fault['input']!r}; " for name, fault in names}
        return [
            f"{name}: {shown[name]}W&B: {fault['msg']}; correct the variable or unset it, or set log.wandb: off"
            for name, fault in names
        ]
    return []
