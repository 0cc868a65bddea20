"""The configuration that a `python -m rlkd.evaluate` command line refers to. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlkd.algorithms.registry import known_options, learn_options
from rlkd.command_line import missing_config
from rlkd.config.load import ConfigError, checked, on_top, read, set_by
from rlkd.config.schema import Config
from rlkd.storage.run_folder import checkpoints, iteration_of


def asked_for(config: Sequence[str], words: Sequence[str]) -> Config:
    """The configuration to evaluate. A run's folder means its `config.yaml`, on top of which come the other files.

    Args:
        config: configuration files, or folders of runs.
        words: `key=value`, or folders of runs.

    The `config.yaml` of a run directory names the model that the run started from. The run's exported student is
    evaluated instead, unless another file or the command line sets `model.path`.

    Raises: ConfigError, also if that run has no student yet.
    """
    folders = [word for word in words if "=" not in word and Path(word).is_dir()]
    files = [str(Path(file, "config.yaml")) if Path(file).is_dir() else file for file in (*folders, *config)]
    overrides = [word for word in words if word not in folders]
    if not files:
        raise missing_config(words)
    under, over, problems = read(files, overrides)
    if "stages" in on_top(under, over).value and not problems:
        raise ConfigError(["stages: evaluate a single stage; its run directory is <run.dir>/<run.name>/<stage>"])
    settings = checked(on_top(under, over), problems, known_options(), learn_options).config
    run_dir = run_directory(set_by(under, over, ("model", "path")), settings)
    path = settings.model.path
    if run_dir is not None:
        path = str(run_dir / "hf")
        if not Path(path).is_dir():
            raise ConfigError([_no_student(run_dir, settings)])
    # The model has no separate adapter: model.path is the base or an export with merged adapter. No weights are sent.
    server = settings.rollout.server.model_copy(update={"weight_sync": "file", "sleep": 0})
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"path": path, "lora": None}),
            "rollout": settings.rollout.model_copy(update={"server": server}),
            "eval": settings.eval.model_copy(update={"every": max(1, settings.eval.every)}),
        }
    )


def run_directory(file: str, config: Config) -> Path | None:
    """The run directory of which `file` is the saved `config.yaml`; None if `file` is any other configuration file."""
    folder = Path(file).parent
    if Path(file).name != "config.yaml":
        return None
    found = [name for name in ("metrics.jsonl", "checkpoints", "hf") if (folder / name).exists()]
    return folder if found or folder.resolve() == Path(config.run_dir).resolve() else None


def _no_student(run_dir: Path, config: Config) -> str:
    saved = [iteration_of(path) for path in checkpoints(run_dir)]
    last = f"; its last checkpoint is of iteration {saved[-1]} of {config.run.iterations}" if saved else ""
    export = "" if config.checkpoint.export else " and checkpoint.export=true"
    return (
        f"{run_dir} has no exported student ({run_dir}/hf) yet{last}: finish its training with "
        f"run.resume=auto{export}, or set the model to evaluate with model.path=FOLDER"
    )
