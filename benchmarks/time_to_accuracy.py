"""How long rlkd and TRL take until the built-in task's student reaches 60 % held-out accuracy, sampled.

    python benchmarks/time_to_accuracy.py [--seeds 3] [--iterations 200] [--threads 1] [--dir runs/time_to_accuracy]
                                          [--arms ARM …] [--student FOLDER] [--plot PNG] [--output MD]
                                          [--same-samples]

All arms have the same initial student, teacher, prompts in the same order, completions per iteration, reward, optimizer
and number of threads, and are evaluated every 10 iterations by rlkd's sampler with the same noise. At the start TRL's
prompts are compared with rlkd's, token by token, and during training the texts that TRL gives to the reward. Each run
is a process of its own, one after another: seed 0 of all arms, then seed 1. It ends two evaluations after the first
one that reaches 60 %. Finished runs are in results.jsonl, and are reused.

Time is that of training, from the beginning of the first iteration, without start-up and evaluations.

With --same-samples rlkd's sampler, with rlkd's noise, draws TRL's completions too. TRL GRPO then has the accuracies of
rlkd GRPO, and TRL's distillation those of rlkd's OPD: both frameworks learn the same from the same completions. Times
are of no use then. GRPO waits for its first right answer, so that its seeds differ much; give --student to begin later.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from against_trl import TRL_PLAIN
from learning import GRPO, NO_TEACHER

if TYPE_CHECKING:  # these import torch, which the parent does not need
    from transformers import PreTrainedModel

    from rlkd.config.schema import Config
    from rlkd.generation.hf import HFSampler
    from rlkd.models.weights import Whole
    from rlkd.types import Prompt

ROOT = Path(__file__).parent.parent
GOAL = 0.6
"""The held-out accuracy, sampled, that ends the clock."""
EVERY = 10
"""Iterations between evaluations."""
AFTER = 2
"""Evaluations after the first one that reaches GOAL."""
Points = list[tuple[int, float, float]]
"""(iteration, avg@k, greedy accuracy) of every evaluation."""


@dataclass(frozen=True)
class Arm:
    """A framework and a method."""

    name: str
    framework: str
    colour: str
    overrides: tuple[str, ...] = ()
    """Of configs/quickstart.yaml, where the framework is rlkd."""


OPD = "algorithm={name: opd, group_size: 8, divergence: {tier: full, kind: reverse_kl}}"
ARMS = (
    Arm("rlkd KDRL", "rlkd", "#009E73"),
    Arm("TRL GRPO", "trl_grpo", "#D55E00"),
    Arm("TRL distillation", "trl_distillation", "#0072B2"),
    Arm("rlkd GRPO", "rlkd", "#E69F00", (GRPO, NO_TEACHER)),
    Arm("rlkd OPD", "rlkd", "#56B4E9", (OPD,)),
)

# ---- the runs, each in a process of its own --------------------------------------------------------------------------


def configured(arm: Arm, args: argparse.Namespace, folder: Path) -> Config:
    """rlkd's configuration of an arm; TRL's arms have their data and evaluation from it."""
    from rlkd.config_file import load

    overrides = (
        *(f"run={{dir: {folder}, name: run, seed: {args.seed}, iterations: {args.iterations}}}", f"eval.every={EVERY}"),
        *("log={rollouts_every: 0, progress: false}", "checkpoint={every: 0, export: false}"),
        *(f"model.path={args.student}", *arm.overrides),
    )
    return load([str(ROOT / "configs" / "quickstart.yaml")], overrides).config


def over(points: Points) -> bool:
    """Whether AFTER evaluations have followed one that reached the goal."""
    return any(point[1] >= GOAL for point in points[:-AFTER])


def differences(times: Sequence[float]) -> list[float]:
    return [end - start for start, end in pairwise(times)]


def rlkd_run(config: Config) -> dict[str, Any]:
    """Train with rlkd.

    Returns: the evaluations ("points"), and the seconds of each iteration without them ("seconds"); "cpu": processor
    time of this process from one iteration's end to the next, evaluations included, so only its median is of use.
    """
    import lightning

    from rlkd.pipeline.loader import RolloutLoader
    from rlkd.run.fit import build_trainer, callbacks, quiet
    from rlkd.training.callback import IterationCallback
    from rlkd.training.module import PolicyModule
    from rlkd.types import Batch

    points: Points = []
    cpu: list[float] = []

    class Stop(IterationCallback):
        def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
            cpu.append(time.process_time())
            if "eval/avg@k" in module.row:
                points.append((batch.iteration + 1, module.row["eval/avg@k"], module.row["eval/greedy"]))
                trainer.should_stop = trainer.should_stop or over(points)

    quiet()
    module = PolicyModule(config)
    loader = RolloutLoader(config, module.algorithm)
    trainer = build_trainer(config, callbacks(config, loader))
    trainer.callbacks.append(Stop())
    try:
        trainer.fit(module, loader)
    finally:
        loader.close()
    rows = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    initial = (0, rows[0]["eval/avg@k"], rows[0]["eval/greedy"])
    seconds = [row["time/total"] - row["time/evaluate"] for row in rows[1:]]
    return {"points": [initial, *points], "seconds": seconds, "cpu": differences(cpu)}


def accuracies(
    model: PreTrainedModel, sampler: HFSampler, config: Config, prompts: Sequence[Prompt]
) -> tuple[float, float]:
    """(avg@k, greedy accuracy) of a model as `rlkd.run.evaluation` computes them, with the same noise."""
    from rlkd.data.chat import completion_text, load_tokenizer
    from rlkd.generation.sampler import Sampling
    from rlkd.rewards.exact_match import exact_match

    tokenizer, found = load_tokenizer(config.model.path), []
    sampler.publish(Whole(model.state_dict()), 0)
    for n, temperature in ((config.eval.samples, config.eval.temperature), (1, 0.0)):
        seed = config.run.seed + 2**31
        sampling = Sampling(temperature=temperature, max_tokens=config.rollout.max_tokens, seed=seed)
        rollouts = (one for group in sampler.sample(prompts, n=n, iteration=0, sampling=sampling) for one in group)
        texts = ((one, completion_text(tokenizer, one.token_ids, one.finish_reason)) for one in rollouts)
        right = (exact_match(text, answer=one.prompt.answer, prompt="", meta={}) for one, text in texts)
        found.append(statistics.fmean(right))
    return found[0], found[1]


def trl_run(arm: Arm, config: Config, folder: Path, same_samples: bool) -> dict[str, Any]:
    """Train with TRL's GRPOTrainer or DistillationTrainer. Returns: as `rlkd_run`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    from rlkd.builtin import resolve
    from rlkd.data.chat import completion_text, load_tokenizer
    from rlkd.data.heldout import heldout_prompts
    from rlkd.data.prompts import PromptStream
    from rlkd.data.sources import load_source
    from rlkd.generation.hf import HFSampler
    from rlkd.generation.sampler import Sampling, eos_ids
    from rlkd.models.weights import Whole
    from rlkd.rewards.exact_match import exact_match

    group, count = 8, config.rollout.prompts
    tokenizer, ends = load_tokenizer(config.model.path), eos_ids(config.model.path, False)
    model, teacher = (
        AutoModelForCausalLM.from_pretrained(resolve(path), dtype=torch.float32)
        for path in (config.model.path, "builtin:teacher")
    )
    stream = PromptStream(load_source(config.data, tokenizer), config.run.seed)
    prompts = [prompt for i in range(config.run.iterations) for prompt in stream.take(i, count)]
    heldout = heldout_prompts(config, tokenizer)
    sampler = HFSampler(config, ends)
    sampler.open()
    distilled = arm.framework == "trl_distillation"
    points: Points = [(0, *accuracies(model, sampler, config, heldout))]
    clock: list[float] = []
    """Seconds at the end of each iteration, without evaluations."""
    cpu: list[float] = []

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.started: float | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.started is None:
                self.started = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            assert self.started is not None
            now = time.perf_counter()
            clock.append(now - self.started)
            cpu.append(time.process_time())
            if state.global_step % EVERY == 0 or state.global_step == config.run.iterations:
                points.append((state.global_step, *accuracies(model, sampler, config, heldout)))
                control.should_training_stop = control.should_training_stop or over(points)
                self.started += time.perf_counter() - now

    def reward(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        rewards = []
        for completion, ids, right in zip(completions, completion_ids, answer, strict=True):
            text = completion_text(tokenizer, ids, "stop" if ids[-1] in ends else "length")
            # TRL leaves out special tokens, which rlkd keeps: <user> within an answer makes it wrong.
            assert completion[0]["content"] == text or "<" in text, (completion, text)
            rewards.append(exact_match(text, answer=right, prompt="", meta={}))
        return rewards

    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": count * group,
        "max_completion_length": config.rollout.max_tokens,
        "learning_rate": config.optim.lr(0),
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": config.optim.weight_decay,
        "adam_beta1": config.optim.betas[0],
        "adam_beta2": config.optim.betas[1],
        "adam_epsilon": config.optim.eps,
        "max_grad_norm": config.optim.max_grad_norm,
        "max_steps": config.run.iterations,
        "seed": config.run.seed,
        "shuffle_dataset": False,
        **TRL_PLAIN,
    }
    # DistillationTrainer samples once per prompt, so each prompt is there once for each completion.
    data = Dataset.from_list(
        [
            {"prompt": [dict(message) for message in prompt.messages], "answer": prompt.answer}
            for prompt in prompts
            for _ in range(group if distilled else 1)
        ]
    )
    parts: dict[str, Any] = {
        "model": model,
        "train_dataset": data,
        "processing_class": tokenizer,
        "callbacks": [Clock()],
    }
    if distilled:
        trainer = DistillationTrainer(args=DistillationConfig(beta=1.0, **common), teacher_model=teacher, **parts)
    else:
        common |= {"num_generations": group, "num_iterations": 1, "beta": 0.0, "loss_type": "dapo"}
        arguments = GRPOConfig(scale_rewards="group", **common)
        trainer = GRPOTrainer(args=arguments, reward_funcs=reward, **parts)
    theirs, *_ = trainer._tokenize_prompts([row["prompt"] for row in data.select(range(count * group))])
    copies = group if distilled else 1
    ours = [list(prompt.token_ids) for prompt in prompts[: count * group // copies] for _ in range(copies)]
    assert theirs == ours, (theirs[0], ours[0])
    assert tuple(trainer.eos_token_ids) == tuple(ends), (trainer.eos_token_ids, ends)
    if same_samples:
        by_ids = {prompt.token_ids: prompt for prompt in prompts}
        sampling = Sampling(temperature=1.0, max_tokens=config.rollout.max_tokens, seed=config.run.seed)

        def drawn(asked: list[list[int]], *_: Any, **__: Any) -> Any:
            assert asked == [ids for ids in asked[::group] for _ in range(group)]
            sampler.publish(Whole(model.state_dict()), len(clock))
            named = [by_ids[tuple(ids)] for ids in asked[::group]]
            groups = sampler.sample(named, n=group, iteration=len(clock), sampling=sampling)
            found = [list(one.token_ids) for rollouts in groups for one in rollouts]
            return found if distilled else (found, None)

        trainer._generate_single_turn = drawn
    trainer.train()
    return {"points": points, "seconds": differences([0.0, *clock]), "cpu": differences(cpu)}


# ---- the parent ------------------------------------------------------------------------------------------------------


def finished(args: argparse.Namespace, arm: Arm, seed: int) -> dict[str, Any]:
    """The result of one run, from results.jsonl or from a new process."""
    results = Path(args.dir, "results.jsonl")
    key = {"arm": arm.name, "seed": seed, "student": args.student}
    key |= {"iterations": args.iterations, "threads": args.threads, "same_samples": args.same_samples}
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else []:
        row: dict[str, Any] = json.loads(line)
        if row.items() >= key.items():
            return row
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    with tempfile.TemporaryDirectory() as folder:
        options = ["--one", arm.name, "--seed", str(seed), "--dir", folder, "--student", args.student]
        options += ["--iterations", str(args.iterations), *(["--same-samples"] if args.same_samples else [])]
        subprocess.run([sys.executable, __file__, *options], check=True, env=environment, stdout=subprocess.DEVNULL)
        found = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(key | found) + "\n")
    return key | found


def with_seconds(run: dict[str, Any]) -> list[tuple[int, float, float, float]]:
    """(iteration, seconds, avg@k, greedy accuracy) of every evaluation."""
    clock = [0.0, *accumulate(run["seconds"])]
    return [(i, clock[i], sampled, greedy) for i, sampled, greedy in run["points"]]


def middle(values: Sequence[float | None], form: str) -> str:
    """Median and range over seeds; a seed that never got there counts as infinite."""
    known = sorted(float("inf") if value is None else value for value in values)
    low, median, high = (
        "never" if value == float("inf") else format(value, form)
        for value in (known[0], statistics.median(known), known[-1])
    )
    return median if low == high else f"{median} ({low}–{high})"


def line(arm: Arm, runs: Sequence[dict[str, Any]]) -> str:
    """A row of the table."""
    curves = [with_seconds(run) for run in runs]
    reached = [next((point for point in curve if point[2] >= GOAL), None) for curve in curves]
    work = [point and point[0] * statistics.median(run["cpu"]) for point, run in zip(reached, runs, strict=True)]
    wall, cpu = (statistics.median(value for run in runs for value in run[name]) for name in ("seconds", "cpu"))
    cells = (
        arm.name,
        f"{sum(point is not None for point in reached)} of {len(runs)}",
        middle([None if point is None else point[0] for point in reached], ".0f"),
        middle([None if point is None else point[1] for point in reached], ".1f"),
        middle(work, ".1f"),
        f"{wall:.3f}",
        f"{cpu:.3f}",
        middle([100 * max(point[2] for point in curve) for curve in curves], ".1f"),
        middle([100 * max(point[3] for point in curve) for curve in curves], ".1f"),
        middle([len(run["seconds"]) for run in runs], ".0f"),
    )
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    *("arm", "reached it", f"iterations to {GOAL:.0%}", f"seconds to {GOAL:.0%}", f"CPU seconds to {GOAL:.0%}"),
    *("s / iteration", "CPU s / iteration", "best sampled %", "best greedy %", "iterations"),
)
FOOTER = """
Median (range) over {seeds} seeds. 16 prompts × 8 completions an iteration, at most {iterations} iterations, evaluated
every {every}; {threads} thread(s), fp32, learning rate 3e-4. A run ends {after} evaluations after the first one that
reaches {goal:.0%}, so the best accuracies are not where training would end. KDRL has rewards and the teacher, GRPO
rewards only, OPD and distillation the teacher only. Other work on the machine has less influence on CPU seconds, the
processor time of the trainer's process: the median of an iteration, times their number. TRL {trl}, torch {torch},
transformers {transformers}.
"""


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw accuracy over seconds, a line for each run; TRL's are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axes, column, what in zip(panels, (2, 3), ("sampled (temperature 1)", "greedy"), strict=True):
        for arm in (arm for arm in ARMS if arm.name in runs):
            style = "-" if arm.framework == "rlkd" else "--"
            for i, run in enumerate(runs[arm.name]):
                curve = with_seconds(run)
                x, y = [point[1] for point in curve], [100 * point[column] for point in curve]
                axes.plot(x, y, style, color=arm.colour, alpha=0.8, label=None if i else arm.name)
        axes.axhline(100 * GOAL, color="grey", linewidth=0.8)
        axes.set(xlabel="seconds of training", title=what, ylim=(0, 100))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy, % (one line per seed)")
    panels[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], default=[arm.name for arm in ARMS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200, help="at most so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dir", default="runs/time_to_accuracy")
    parser.add_argument("--student", default="builtin:student", help="the initial student")
    parser.add_argument("--plot", type=Path, help="where to draw accuracy over seconds, e.g. time_to_accuracy.png")
    parser.add_argument("--output", type=Path, help="where to write the table; by default it is only printed")
    parser.add_argument("--same-samples", action="store_true", help="a check: both frameworks learn the same")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        arm, folder = next(arm for arm in ARMS if arm.name == args.one), Path(args.dir)
        config = configured(arm, args, folder)
        found = rlkd_run(config) if arm.framework == "rlkd" else trl_run(arm, config, folder, args.same_samples)
        folder.joinpath("found.json").write_text(json.dumps(found), encoding="utf-8")
        return
    Path(args.dir).mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in ARMS if arm.name in args.arms]
    runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for seed in range(args.seeds):
        for arm in arms:
            run = finished(args, arm, seed)
            runs[arm.name].append(run)
            last = with_seconds(run)[-1]
            print(f"seed {seed}, {arm.name}: {last[2]:.1%} after {last[0]} iterations, {last[1]:.1f} s", flush=True)
        starts = {tuple(runs[arm.name][seed]["points"][0]) for arm in arms}
        assert len(starts) == 1, f"the arms start from different accuracies: {starts}"
        for trl, own in (("TRL GRPO", "rlkd GRPO"), ("TRL distillation", "rlkd OPD")):
            if args.same_samples and {trl, own} <= runs.keys():
                pairs = zip(runs[trl][seed]["points"], runs[own][seed]["points"], strict=False)
                print(f"{trl} and {own} differ by at most {max(abs(a[1] - b[1]) for a, b in pairs):.1%}", flush=True)
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *(line(arm, runs[arm.name]) for arm in arms)]
    versions = {name: version(name) for name in ("trl", "torch", "transformers")}
    told = {"seeds": args.seeds, "iterations": args.iterations, "threads": args.threads}
    table = "\n".join(rows) + "\n" + FOOTER.format(every=EVERY, after=AFTER, goal=GOAL, **told, **versions)
    print(f"\n{table}", end="")
    if args.output is not None:
        args.output.write_text(f"\n## Time to {GOAL:.0%} on the built-in task\n\n{table}", encoding="utf-8")
    if args.plot is not None:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
