"""The configuration that a `python -m rlkd.evaluate` command line refers to. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlkd.algorithms.registry import known_options, learn_options
from rlkd.config.load import ConfigError, checked, on_top, parse_args, read, set_by
from rlkd.config.schema import Config
from rlkd.storage.run_folder import checkpoints, iteration_of


def asked_for(argv: Sequence[str]) -> Config:
    """The configuration to evaluate; a folder given without a flag is a run directory.

    A run directory's `config.yaml` contains the model that the run started from. This function replaces it by the
    run's exported student, unless another file or the command line sets `model.path`.

    Raises: ConfigError, also if that run has not exported a student yet.
    """
    words = []
    for before, word in zip(["", *argv], argv, strict=False):
        file = str(Path(word, "config.yaml")) if Path(word).is_dir() else None
        words.append(word if file is None else file if before == "--config" else f"--config={file}")
    args = parse_args(words)
    under, over, problems = read(args.files, args.overrides)
    if "stages" in on_top(under, over).value and not problems:
        raise ConfigError(
            [
                "stages: expected one run, got several stages; evaluate one stage's run directory "
                "<run.dir>/<run.name>/<stage>"
            ]
        )
    config = checked(on_top(under, over), problems, known_options(), learn_options).config
    run_dir = run_directory(set_by(under, over, ("model", "path")), config)
    path = config.model.path
    if run_dir is not None:
        path = str(run_dir / "hf")
        if not Path(path).is_dir():
            raise ConfigError([_no_student(run_dir, config)])
    # The evaluated model has no separate adapter (exports have it merged in), and no weights are sent to servers.
    server = config.rollout.server.model_copy(update={"weight_sync": "file"})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": path, "lora": None}),
            "rollout": config.rollout.model_copy(update={"server": server}),
            "eval": config.eval.model_copy(update={"every": max(1, config.eval.every)}),
        }
    )


def run_directory(file: str, config: Config) -> Path | None:
    """The run directory that `file` is the config.yaml of, if a run was started there; otherwise None."""
    folder = Path(file).parent
    if Path(file).name != "config.yaml":
        return None
    begun = [name for name in ("metrics.jsonl", "checkpoints", "hf") if (folder / name).exists()]
    return folder if begun or folder.resolve() == Path(config.run_dir).resolve() else None


def _no_student(run_dir: Path, config: Config) -> str:
    saved = [iteration_of(path) for path in checkpoints(run_dir)]
    seen = f"; its last checkpoint is of iteration {saved[-1]} of {config.run.iterations}" if saved else ""
    off = "" if config.checkpoint.export else " and checkpoint.export=true"
    return (
        f"{run_dir} has no exported student ({run_dir}/hf) yet{seen}: finish the run with run.resume=auto{off}, or "
        "set model.path=FOLDER to the model to evaluate"
    )
