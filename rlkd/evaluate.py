"""Held-out accuracy: greedy, avg@k and pass@k, during a run and as a command.

python -m rlkd.evaluate runs/x [key=value …]
python -m rlkd.evaluate --config X.yaml model.path=FOLDER [key=value …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from transformers import PreTrainedTokenizerBase

from rlkd import distributed
from rlkd.config import Config, DataConfig
from rlkd.data.sources import load_source
from rlkd.distributed import RunStopped
from rlkd.iteration_callback import IterationCallback
from rlkd.metrics import Meter
from rlkd.module import PolicyModule
from rlkd.resume import checkpoints, exported, iteration_of, seen_by
from rlkd.rollout.loader import RolloutLoader, check_errors
from rlkd.rollout.parts import build_reference
from rlkd.rollout.sampler import Sampling
from rlkd.teachers.parity import sampler_gap
from rlkd.tiny import BUILTIN
from rlkd.types import Batch, Prompt, ScoredRollout

_LARGE_GIB = 4.0
"""From this size on, a copy of the model is worth a word."""


def heldout(config: Config) -> DataConfig | None:
    """Where held-out prompts come from: eval.path, else the built-in task's own split, else nowhere."""
    if config.eval.path is not None:
        path, split = config.eval.path, config.eval.split
    elif config.data.path.startswith(BUILTIN):
        path, split = config.data.path, "heldout"
    else:
        return None
    # What is only trained on need not be there.
    columns = dict.fromkeys(("privileged_column", "completion_column", "rejected_column"))
    return config.data.model_copy(update={"path": path, "split": split, "limit": config.eval.prompts, **columns})


def heldout_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The first `eval.prompts` held-out prompts; none when the run has no held-out data."""
    data = heldout(config)
    if data is None:
        return []
    source = load_source(data, tokenizer)
    if distributed.rank() == 0:
        for note in source.notes:
            print(f"eval: {note}", file=sys.stderr, flush=True)
    return list(source)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 − C(n−c, k) / C(n, k): the chance that k of n samples, c of them correct, hold a correct one.

    The unbiased estimator of arXiv 2107.03374, Eq. 1. Raises: ValueError where k of n samples cannot be drawn.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: wants 1 ≤ k ≤ samples; sample more, or lower k")
    if samples - correct < k:
        return 1.0
    wrong = 1.0
    for i in range(samples - correct + 1, samples + 1):
        wrong *= 1.0 - k / i
    return 1.0 - wrong


def evaluate(config: Config, loader: RolloutLoader, prompts: list[Prompt], *, strict: bool = True) -> dict[str, float]:
    """eval/greedy, eval/avg@k and eval/pass@k (k = eval.samples) by the published weights.

    A collective: each rank takes its share of `prompts`. The noise is the same at every evaluation of a run.

    Raises: with `strict`, RunStopped when more rewards failed than `reward.max_error_rate` allows.
    """
    mine = prompts[distributed.rank() :: distributed.world_size()]
    meter, groups = loader.with_servers(lambda: _evaluated(config, loader, mine))
    if strict:
        check_errors(groups, config, "evaluation")
    return meter.reduce()


def _evaluated(config: Config, loader: RolloutLoader, mine: list[Prompt]) -> tuple[Meter, list[list[ScoredRollout]]]:
    """The figures of this rank's share, and all that they are of."""
    meter, scored = Meter(), []
    plans = (("greedy", 1, 0.0), ("sampled", config.eval.samples, config.eval.temperature))
    meter.total("eval/errors", 0.0)
    for name in ("eval/greedy", "eval/avg@k", "eval/pass@k"):
        meter.mean(name, 0.0, 0.0)
    for plan, n, temperature in plans:
        if not mine:
            continue
        # Another seed than training's, so that no training sample is ever drawn again here.
        sampling = Sampling(temperature=temperature, max_tokens=config.rollout.max_tokens, seed=config.run.seed + 2**31)
        groups = loader.reward(loader.policy.sample(mine, n=n, iteration=0, sampling=sampling))
        scored += groups
        for group in groups:
            known = [s.is_correct(config.reward.correct_at) is True for s in group if s.reward is not None]
            meter.total("eval/errors", float(len(group) - len(known)))
            if plan == "greedy":
                meter.mean("eval/greedy", sum(known), len(known))
            elif known:
                meter.mean("eval/avg@k", sum(known) / len(known), 1.0)
                if len(known) == n:  # of fewer there is no pass@n
                    meter.mean("eval/pass@k", pass_at_k(n, sum(known), n), 1.0)
    return meter, scored


class Evaluate(IterationCallback):
    """Evaluates before the first iteration, every `eval.every` iterations and after the last."""

    def __init__(self, config: Config, loader: RolloutLoader):
        self.config = config
        self.loader = loader
        self.prompts = heldout_prompts(config, loader.tokenizer) if config.eval.every else []

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        if self.config.eval.every and not self.prompts and distributed.rank() == 0:
            print(
                "eval.path: not set, so this run has no held-out accuracy; set it to held-out data of your own (as "
                "data.path is), or eval.every to 0",
                flush=True,
            )
        if self.prompts and self.loader.iteration == 0:
            self._evaluate(module)

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        done = batch.iteration + 1
        if self.prompts and (done % self.config.eval.every == 0 or done == self.config.run.iterations):
            self._evaluate(module)

    def _evaluate(self, module: PolicyModule) -> None:
        # What training does not depend on does not end it.
        module.row.update(evaluate(self.config, self.loader, self.prompts, strict=module.needs_rewards))


def main(argv: list[str]) -> int:
    """Evaluate a student on the held-out data of a config; prints one JSON object, and on stderr what was measured.

    Exit code 0 for success, 2 for a wrong config or set-up (one line each on stderr), 1 where the evaluation stopped.
    """
    from rlkd.config_file import ConfigError
    from rlkd.preflight import check_evaluation
    from rlkd.train import quiet

    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\nKeys are those of rlkd.train; python -m rlkd.train --help lists them.")
        return 0
    try:
        config = asked_for(argv)
    except ConfigError as error:
        print("\n".join(error.lines), file=sys.stderr)
        return 2
    problems = check_evaluation(config)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    quiet()
    try:
        print(json.dumps(measured(config)))
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def asked_for(argv: Sequence[str]) -> Config:
    """The configuration that a command line asks to evaluate; a lone folder is the run in it.

    A run directory's own `config.yaml` names the model that the run began with. What is asked for is the run's student,
    unless another file or the command line says what `model.path` is.

    Raises: ConfigError, also where that run has no student yet.
    """
    from rlkd.config_file import ConfigError, load, on_top, parse_args, read, set_by

    words = []
    for before, word in zip(["", *argv], argv, strict=False):
        file = str(Path(word, "config.yaml")) if Path(word).is_dir() else None
        words.append(word if file is None else file if before == "--config" else f"--config={file}")
    args = parse_args(words)
    under, over, problems = read(args.files, args.overrides)
    if "stages" in on_top(under, over).value and not problems:
        raise ConfigError(["stages: evaluate one stage, whose run directory is <run.dir>/<run.name>/<stage>"])
    config = load(args.files, args.overrides).config
    run_dir = run_directory(set_by(under, over, ("model", "path")), config)
    path = config.model.path
    if run_dir is not None:
        path = str(run_dir / "hf")
        if not Path(path).is_dir():
            raise ConfigError([_no_student(run_dir, config)])
    # What is evaluated is whole: model.path is the base, or an export with its adapter merged. No weights are sent.
    server = config.rollout.server.model_copy(update={"weight_sync": "file"})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": path, "lora": None}),
            "rollout": config.rollout.model_copy(update={"server": server}),
            "eval": config.eval.model_copy(update={"every": max(1, config.eval.every)}),
        }
    )


def run_directory(file: str, config: Config) -> Path | None:
    """The run whose own configuration `file` is, in which a run has been begun; None: a file that stands elsewhere."""
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
        f"{run_dir} has no exported student ({run_dir}/hf) yet{seen}: train it to its end, by run.resume=auto{off}, or "
        "name the model to evaluate by model.path=FOLDER"
    )


def measured(config: Config) -> dict[str, float]:
    """The figures of `model.path`, which a sampler or server loads by itself: nothing is published.

    Raises: RunStopped, one line; also where what samples is not the model at `model.path`.
    """
    from rlkd.algorithms import ALGORITHMS

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
