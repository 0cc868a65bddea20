"""The configurations that an `rlkd evaluate` command line refers to. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from rlkd.algorithms.grpo_options import GRPOConfig
from rlkd.algorithms.registry import known_options, learn_options
from rlkd.command_line import missing_config
from rlkd.config.load import ConfigError, checked, on_top, read, set_by
from rlkd.config.schema import Config, NoTeacherConfig
from rlkd.config.yaml_tree import Node, at
from rlkd.storage.run_folder import EXPORT_RECORD, checkpoints, iteration_of

MATHEMATICAL = ("gsm8k:", "math-500:")
"""Formats whose answers only the reward `math` can judge; it is used where no reward is configured."""


def asked_for(config: Sequence[str], words: Sequence[str], data: Sequence[str] = ()) -> Config:
    """The configuration to evaluate.

    Args:
        config: configuration files, or folders of runs.
        words: `key=value`, or folders of runs or models.
        data: what is held out instead of the configuration's (`benchmarks`); then it need not name any data.

    A run's folder means its `config.yaml`, on top of which come the other files. It names the model that the run
    started from. The run's exported student is evaluated instead, unless another file or the command line sets
    `model.path`. The folder of a model sets `model.path`; a student that a run exported is evaluated on that run's
    data. Of the algorithm, the teacher and the training data nothing is asked, since an evaluation uses none.

    Raises: ConfigError, also if that run has no student yet.
    """
    folders = [word for word in words if "=" not in word and Path(word).is_dir()]
    models = [folder for folder in folders if _is_model(Path(folder))]
    runs = [folder for folder in folders if folder not in models]
    runs += [str(Path(model).parent) for model in models if _is_students(Path(model)) and not config]
    files = [str(Path(file, "config.yaml")) if Path(file).is_dir() else file for file in (*runs, *config)]
    overrides = [*(f"model.path={model}" for model in models), *(word for word in words if word not in folders)]
    if not files and not any(word.startswith("model.path=") for word in overrides):
        raise missing_config(words)
    under, over, problems = read(files, overrides)
    if "stages" in on_top(under, over).value and not problems:
        raise ConfigError(["stages: evaluate a single stage; its run directory is <run.dir>/<run.name>/<stage>"])
    root = on_top(_unasked(on_top(under, over), data), on_top(under, over))
    settings = checked(root, problems, known_options(), learn_options).config
    run_dir = run_directory(set_by(under, over, ("model", "path")), settings)
    students = run_dir is not None or any(_is_students(Path(model)) for model in models)
    if students and not data and {"fraction", "fraction_seed"} & _set_in(over, "eval"):
        raise ConfigError(
            [
                "eval.fraction: decides what a run was trained on, so it must be as in its config.yaml; leave it out, "
                "or use other data with --data"
            ]
        )
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
            "teacher": NoTeacherConfig(),
            "algorithm": GRPOConfig(name="grpo"),  # any that only samples and rewards
            "rollout": settings.rollout.model_copy(update={"server": server, "max_staleness": 0}),
            "eval": settings.eval.model_copy(update={"every": max(1, settings.eval.every)}),
        }
    )


def _set_in(over: Node, section: str) -> set[str]:
    """The keys of a section that the command line sets."""
    node, exact = at(over, (section,))
    return set(node.value) if exact and isinstance(node.value, dict) else set()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def _is_students(folder: Path) -> bool:
    """Whether a run has exported the model in `folder`, and the run's configuration is above it."""
    return (folder / EXPORT_RECORD).is_file() and (folder.parent / "config.yaml").is_file()


def _unasked(root: Node, data: Sequence[str]) -> Node:
    """What a configuration for training must have, where `root` has none: an algorithm, data, and a reward for it."""
    keys = ["algorithm.name=grpo"] if "algorithm" not in root.value else []
    paths = list(data) or [node.value for node, exact in [at(root, ("eval", "path"))] if exact]
    if paths and not at(root, ("data", "path"))[1]:
        keys.append(f"data.path={paths[0]}")
    if paths and "reward" not in root.value and all(str(path).startswith(MATHEMATICAL) for path in paths):
        keys.append("reward.functions=[{name: math}]")
    return read([], keys)[1]


def benchmarks(config: Config, data: Sequence[str]) -> dict[str, Config]:
    """The configuration of each benchmark, by the name of its file. They differ only in their held-out data.

    `data`: held-out data, each as eval.path; if there is none, that of `config` is the only benchmark. Names that
    repeat are numbered.
    """
    found: dict[str, Config] = {}
    for path in data or [config.eval.path or config.data.path]:
        plain = _name(path)
        names = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in found)
        held_out = {"path": path, "fraction": None} if data else {}
        found[name] = config.model_copy(update={"eval": config.eval.model_copy(update=held_out)})
    return found


def _name(path: str) -> str:
    """A name for the benchmark at `path` that a file can have: `gsm8k:test.jsonl` is gsm8k, `data/own.jsonl` is own."""
    before, colon, after = path.partition(":")
    name = before if colon and before != "builtin" else Path(after or before).name.removesuffix(".jsonl")
    return re.sub(r"[^\w.+-]+", "-", name) or "data"


def out_folder(model: str) -> Path:
    """Where the evaluation of the model at `model` is kept: in its run, or else in ./evaluation."""
    folder = Path(model)
    if _is_students(folder):
        return folder.parent / ("evaluation" if folder.name == "hf" else f"evaluation-{folder.name}")
    return Path("evaluation", re.sub(r"[^\w.+-]+", "-", folder.name))


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
