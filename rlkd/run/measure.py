"""The evaluation of `rlkd evaluate`: of the model at `model.path`, without a trainer and without training data."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlkd.algorithms.registry import build_algorithm
from rlkd.config.schema import Config
from rlkd.data.heldout import heldout, heldout_source
from rlkd.distributed import RunStopped
from rlkd.pipeline.build import build_reference
from rlkd.pipeline.loader import RolloutLoader
from rlkd.rewards.votes import vote
from rlkd.run.evaluated import SUMMARY, Record, figures, write_records
from rlkd.run.evaluation import Answered, answered, is_correct
from rlkd.storage import atomic
from rlkd.storage.disk_errors import writing
from rlkd.storage.run_folder import checkpoints, exported, iteration_of, seen_by
from rlkd.teachers.parity import sampler_gap
from rlkd.types import Prompt, ScoredRollout

_LARGE_GIB = 4.0
"""A copy of the model of at least this size is mentioned on the console."""


def measured(benchmarks: Mapping[str, Config], out: Path, ks: Sequence[int]) -> dict[str, Any]:
    """Measure `model.path`, which the sampler or server has loaded itself; nothing is published.

    Args:
        benchmarks: name → configuration; they differ only in their held-out data.
        out: the folder for the records of each benchmark, NAME.jsonl, and the summary.
        ks: the k of pass@k and majority@k.

    Returns: the summary. Under `benchmarks`, each has `figures` and what it was measured on; `eval/…` are the means
        over the benchmarks.

    Raises: RunStopped, one line, also if the model that samples is not the one at `model.path`.
    """
    config = next(iter(benchmarks.values()))
    algorithm = build_algorithm(config)
    sources = {name: heldout_source(one, algorithm.tokenizer) for name, one in benchmarks.items()}
    prompts: dict[str, list[Prompt]] = {}
    for name, source in sources.items():
        assert source is not None, "expected a checked configuration"
        prompts[name] = list(source)[: config.eval.prompts]
        for note in source.notes:
            print(f"{name}: {note}", file=sys.stderr)
    loader = RolloutLoader(config, algorithm, next(iter(sources.values())))
    print(what_is_measured(benchmarks, {name: len(of) for name, of in prompts.items()}), file=sys.stderr, flush=True)
    summary: dict[str, Any] = {
        "model": config.model.path,
        "iterations": seen_by(config.model.path),
        "rewards": [function.name for function in config.reward.functions],
        "backend": config.rollout.backend,
        "samples": config.eval.samples,
        "temperature": config.eval.temperature,
        "max_tokens": config.rollout.max_tokens,
        "seed": config.run.seed,
        "out": str(out),
        "benchmarks": {},
    }
    try:
        loader.policy.start()
        loader.policy.open()
        loader.policy.keep_loaded()
        loader.line.rewards.open()
        check_sampler(config, loader, [prompt for of in prompts.values() for prompt in of])
        for name, one in benchmarks.items():
            records = [record(found, config, loader) for found in answered(config, loader, prompts[name])]
            with writing(f"the evaluation, to {out},"):
                write_records(records, out / f"{name}.jsonl")
            data = heldout(one)
            assert data is not None
            about = {"data": data.path, "split": data.split, "prompts": len(records)}
            found = figures(records, ks, seed=config.run.seed, max_tokens=config.rollout.max_tokens)
            summary["benchmarks"][name] = about | found
    finally:
        loader.close()
    summary |= _means(list(summary["benchmarks"].values()), config.eval.samples)
    with writing(f"the evaluation, to {out},"):
        atomic.write(out / SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def _means(benchmarks: Sequence[Mapping[str, Any]], samples: int) -> dict[str, float]:
    """The means over the benchmarks of the figures that a run logs, under their names there."""
    names = {"eval/greedy": "greedy", "eval/avg@k": f"avg@{samples}", "eval/pass@k": f"pass@{samples}"}
    known = {key: [one[name]["mean"] for one in benchmarks if name in one] for key, name in names.items()}
    means = {key: sum(values) / len(values) for key, values in known.items() if values}
    return means | {"eval/errors": float(sum(one["errors"] for one in benchmarks))}


def record(found: Answered, config: Config, loader: RolloutLoader) -> Record:
    """A prompt and its completions as a line of NAME.jsonl (see `evaluated.Record`)."""

    def completion(scored: ScoredRollout) -> dict[str, Any]:
        text = loader.algorithm.text(scored.rollout)
        return {
            "completion": text,
            "reward": scored.reward,
            "correct": is_correct(scored, config),
            "error": scored.error,
            "vote": vote(config.reward.functions, text),
            "tokens": len(scored.rollout.token_ids),
            "finish_reason": scored.rollout.finish_reason,
        }

    return {
        "id": found.prompt.id,
        "prompt": [dict(message) for message in found.prompt.messages],
        "answer": found.prompt.answer,
        "greedy": completion(found.greedy),
        "samples": [completion(sample) for sample in found.samples],
    }


def what_is_measured(benchmarks: Mapping[str, Config], prompts: Mapping[str, int]) -> str:
    """One line for the console: the model and its iterations, the data, and the number of samples."""
    config = next(iter(benchmarks.values()))
    path = config.model.path
    iterations = seen_by(path)
    if iterations:
        model = f"{path}, after {iterations} iterations"
        saved = [iteration_of(checkpoint) for checkpoint in checkpoints(Path(path).parent)]
        if saved and saved[-1] > iterations and Path(path).name == "hf":
            model += f" (its run has saved iteration {saved[-1]}, but exports a student only at its end)"
    else:
        model = f"{path}, which is not a student exported by a run"
        if exported(config.run_dir):
            model += f" (to evaluate the student of this run: rlkd evaluate {config.run_dir})"
    parts = []
    for name, one in benchmarks.items():
        data = heldout(one)
        assert data is not None, "expected a checked configuration"
        share = ", held out by eval.fraction" if one.eval.fraction is not None else ""
        parts.append(f"data {data.path}, split {data.split}{share}: {prompts[name]} prompts")
    return (
        f"evaluating {model}; {'; '.join(parts)}, greedy and {config.eval.samples} samples each at temperature "
        f"{config.eval.temperature:g}, rewarded by {', '.join(f.name for f in config.reward.functions)}"
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
