"""The evaluation of `python -m rlkd.evaluate`: of the model at `model.path`, without a trainer."""

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
"""A copy of the model of at least this size is mentioned on the console."""


def measured(config: Config) -> dict[str, float]:
    """The evaluation metrics of `model.path`, which the sampler or server has loaded itself; nothing is published.

    Raises: RunStopped, one line, also if the model that samples is not the one at `model.path`.
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
