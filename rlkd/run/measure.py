"""The evaluation of `python -m rlkd.evaluate`: of the model at `model.path`, without a trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rlkd.algorithms import ALGORITHMS
from rlkd.config.load import ConfigError, load, on_top, parse_args, read, set_by
from rlkd.config.schema import Config
from rlkd.data.heldout import heldout, heldout_prompts
from rlkd.distributed import RunStopped
from rlkd.pipeline.build import build_reference
from rlkd.pipeline.loader import RolloutLoader
from rlkd.run.evaluation import evaluate
from rlkd.storage.run_folder import checkpoints, exported, iteration_of, seen_by
from rlkd.teachers.parity import sampler_gap
from rlkd.types import Prompt

_LARGE_GIB = 4.0
"""A copy of the model of at least this size is mentioned on the console."""


def asked_for(argv: Sequence[str]) -> Config:
    """The configuration to evaluate, from a command line. A folder stands for the `config.yaml` of the run in it.

    The `config.yaml` of a run directory names the model that the run started from. The run's exported student is
    evaluated instead, unless another file or the command line sets `model.path`.

    Raises: ConfigError, also if that run has no student yet.
    """
    arguments = []
    for before, argument in zip(["", *argv], argv, strict=False):
        file = str(Path(argument, "config.yaml")) if Path(argument).is_dir() else None
        arguments.append(argument if file is None else file if before == "--config" else f"--config={file}")
    args = parse_args(arguments)
    under, over, problems = read(args.files, args.overrides)
    if "stages" in on_top(under, over).value and not problems:
        raise ConfigError(["stages: evaluate a single stage; its run directory is <run.dir>/<run.name>/<stage>"])
    config = load(args.files, args.overrides).config
    run_dir = run_directory(set_by(under, over, ("model", "path")), config)
    path = config.model.path
    if run_dir is not None:
        path = str(run_dir / "hf")
        if not Path(path).is_dir():
            raise ConfigError([_no_student(run_dir, config)])
    # The model has no separate adapter: model.path is the base or an export with merged adapter. No weights are sent.
    server = config.rollout.server.model_copy(update={"weight_sync": "file"})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": path, "lora": None}),
            "rollout": config.rollout.model_copy(update={"server": server}),
            "eval": config.eval.model_copy(update={"every": max(1, config.eval.every)}),
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


def measured(config: Config) -> dict[str, float]:
    """The evaluation metrics of `model.path`, which the sampler or server has loaded itself; nothing is published.

    Raises: RunStopped, one line, also if the model that samples is not the one at `model.path`.
    """
    loader = RolloutLoader(config, ALGORITHMS[config.algorithm.name](config))
    prompts = heldout_prompts(config, loader.tokenizer)
    print(what_is_measured(config, len(prompts)), file=sys.stderr, flush=True)
    try:
        loader.policy.start()
        loader.policy.open()
        loader.policy.keep_loaded()
        loader.rewards.open()
        check_sampler(config, loader, prompts)
        return evaluate(config, loader, prompts)
    finally:
        loader.close()


def what_is_measured(config: Config, prompts: int) -> str:
    """One line for the console: the model and its iterations, the data, and the number of samples."""
    data, path = heldout(config), config.model.path
    assert data is not None, "expected a checked configuration"
    iterations = seen_by(path)
    if iterations:
        model = f"{path}, after {iterations} iterations"
        saved = [iteration_of(checkpoint) for checkpoint in checkpoints(Path(path).parent)]
        if saved and saved[-1] > iterations:
            model += f" (its run has saved iteration {saved[-1]}, but exports a student only at its end)"
    else:
        model = f"{path}, which is not a student exported by a run"
        if exported(config.run_dir):
            model += f" (to evaluate the student of this run: python -m rlkd.evaluate {config.run_dir})"
    return (
        f"evaluating {model}; data {data.path}, split {data.split}: {prompts} prompts, "
        f"greedy and {config.eval.samples} samples each at temperature {config.eval.temperature:g}"
    )


def check_sampler(config: Config, loader: RolloutLoader, prompts: list[Prompt]) -> None:
    """Score a few sampled completions with a copy of `model.path` in this process.

    Raises: RunStopped if the sampler's log-probs differ by more than `rollout.max_mismatch` on average, because it has
        other weights or computes differently; also if the copy does not fit into memory.
    """
    copy = build_reference(config)
    try:
        copy.open()
        device = copy.hf.device.type
        size = copy.hf.num_parameters() * copy.hf.dtype.itemsize / 2**30
        if size >= _LARGE_GIB:
            print(f"checking the sampler with a copy of the model here: {size:.0f} GiB, {device}", file=sys.stderr)
        gap = loader.with_servers(lambda: sampler_gap(config, prompts, loader.policy, copy)[1])
    except torch.OutOfMemoryError as error:
        raise RunStopped(
            f"not enough memory for a copy of {config.model.path} to check the sampler; trainer.accelerator=cpu puts "
            f"the copy in main memory, trainer.precision=bf16 halves it: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        copy.close()
    if not gap <= config.rollout.max_mismatch:
        raise RunStopped(
            f"expected log-probs of the sampler and of {config.model.path} to differ by at most rollout.max_mismatch = "
            f"{config.rollout.max_mismatch} nats per token on average, got {gap:.3g}; nothing was evaluated. The "
            "sampler has other weights, or a different dtype, chat template or temperature"
        )
