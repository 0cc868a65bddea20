"""What `python -m rlkd.evaluate` measures: the model at `model.path`, which no trainer publishes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rlkd.algorithms.registry import build_algorithm
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
"""From this size on, a copy of the model is worth a word."""


def measured(config: Config) -> dict[str, float]:
    """The figures of `model.path`, which a sampler or server loads by itself: nothing is published.

    Raises: RunStopped, one line; also where what samples is not the model at `model.path`.
    """
    loader = RolloutLoader(config, build_algorithm(config))
    prompts = heldout_prompts(config, loader.tokenizer)
    print(what_is_measured(config, len(prompts)), file=sys.stderr, flush=True)
    try:
        loader.policy.start()
        loader.policy.open()
        loader.policy.keep_loaded()
        loader.line.rewards.open()
        check_sampler(config, loader, prompts)
        return evaluate(config, loader, prompts)
    finally:
        loader.close()


def what_is_measured(config: Config, prompts: int) -> str:
    """One line: which model after how many iterations, on what, how often."""
    data, path = heldout(config), config.model.path
    assert data is not None, "the configuration was checked"
    seen = seen_by(path)
    if seen:
        model = f"{path}, after {seen} iterations"
        saved = [iteration_of(checkpoint) for checkpoint in checkpoints(Path(path).parent)]
        if saved and saved[-1] > seen:
            model += f" (its run has saved iteration {saved[-1]}, but exports a student at its end)"
    else:
        model = f"{path}, which is no student that a run has exported"
        if exported(config.run_dir):
            model += f" (that of this run: python -m rlkd.evaluate {config.run_dir})"
    return (
        f"evaluating {model}; data {data.path}, split {data.split}: {prompts} prompts, "
        f"greedy and {config.eval.samples} samples each at temperature {config.eval.temperature:g}"
    )


def check_sampler(config: Config, loader: RolloutLoader, prompts: list[Prompt]) -> None:
    """Score a few sampled completions by a copy of `model.path` in this process.

    Raises: RunStopped when the sampler disagrees with it by more than `rollout.max_mismatch`: it holds other weights,
        or computes otherwise; also where the copy finds no room.
    """
    copy = build_reference(config)
    try:
        copy.open()
        device = copy.hf.device.type
        size = copy.hf.num_parameters() * copy.hf.dtype.itemsize / 2**30
        if size >= _LARGE_GIB:
            print(f"checking the sampler by a copy in this process: {size:.0f} GiB, {device}", file=sys.stderr)
        gap = loader.with_servers(lambda: sampler_gap(config, prompts, loader.policy, copy)[1])
    except torch.OutOfMemoryError as error:
        raise RunStopped(
            f"no room for a copy of {config.model.path}, by which the sampler is checked; trainer.accelerator=cpu puts "
            f"it in main memory, trainer.precision=bf16 halves it: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        copy.close()
    if not gap <= config.rollout.max_mismatch:
        raise RunStopped(
            f"the sampler and {config.model.path} disagree by {gap:.3g} nats a token on average, more than "
            f"rollout.max_mismatch = {config.rollout.max_mismatch}; nothing was measured. The sampler holds other "
            "weights, or computes otherwise (dtype, chat template, temperature)"
        )
