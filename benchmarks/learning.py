"""Compares how well each objective learns the built-in task.

python benchmarks/learning.py [--groups signals,opd,self,switch,offline] [--seeds 3] [--iterations 200] [--jobs 1]
                              [--dir runs/learning] [key=value …]

All arms have the same student, prompts, iterations, learning rate and sampler. Prints mean ± standard deviation of the
held-out accuracy (sampled at temperature 1, and greedy) and the iterations to 50 %, and writes learning.csv and
learning.png into --dir. Finished runs are reused.

    signals   rewards, a teacher, or both
    opd       on-policy distillation: which divergence, over how much of the vocabulary
    self      the student shown hints is its own teacher: which divergence, which weights; control: shuffled hints
    switch    when the teacher is removed: never, gradually, abruptly
    offline   right answers only, or right and wrong ones (the wrong ones have slips like the student's)
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlkd.builtin import task
from rlkd.builtin.make import with_slips

HALF = 0.5
Points = list[tuple[int, float, float]]
"""(iteration, greedy accuracy, avg@k) of every evaluation."""

GRPO = "algorithm={name: grpo, group_size: 8}"
NO_TEACHER = "teacher={backend: none}"


def opd(divergence: str, iterations: int) -> tuple[str, ...]:
    """Overrides for OPD with `divergence`."""
    # With a constant rate the student would end as unsure as its teacher, whose greedy answers are better.
    falling = f"optim.lr={{kind: cosine, start: 3.0e-4, end: 1.0e-5, over: {iterations}}}"
    return (f"algorithm={{name: opd, group_size: 8, divergence: {{{divergence}}}}}", falling)


def self_taught(teacher: str = "weights: fixed", divergence: str = "kind: reverse_kl") -> tuple[str, ...]:
    """Overrides for OPSD with these options of the teacher and the divergence."""
    context = "context: {template: '{prompt}{context}', reference: ' hint: {text}'}"
    algorithm = f"{{name: opsd, group_size: 8, divergence: {{clip: null, {divergence}}}, {context}}}"
    return (f"teacher={{backend: self, {teacher}}}", f"algorithm={algorithm}", "data.privileged_column=privileged")


def columns(data: Path) -> tuple[str, ...]:
    """Overrides that read the task from the file `data`; evaluation still uses the built-in held-out words."""
    return (f"data.path={data}", "data.id_column=id")


def groups(data: Path, iterations: int) -> dict[str, dict[str, tuple[str, ...]]]:
    """group → arm → overrides of configs/quickstart.yaml."""
    half = iterations // 2
    first = f"run: {{iterations: {half}}}"
    rest = f"run: {{iterations: {iterations - half}}}"
    pairs = (
        *columns(data / "pairs.jsonl"),
        "data.completion_column=answer",
        "data.max_completion_tokens=16",
        NO_TEACHER,
    )
    return {
        "signals": {
            "GRPO": (GRPO, NO_TEACHER),
            "KD only": ("algorithm.policy_coef=0", "algorithm.kd.coef=1"),
            "KDRL": (),
        },
        "opd": {
            "OPD reverse KL": opd("kind: reverse_kl", iterations),
            "OPD forward KL": opd("kind: forward_kl", iterations),
            "OPD JSD(0.5)": opd("kind: jsd", iterations),
            "OPD top 8": opd("tier: top_k, k: 8", iterations),
            "OPD sampled": opd("tier: sampled", iterations),
        },
        "self": {
            "OPSD reverse KL": self_taught(),
            "OPSD forward KL": self_taught(divergence="kind: forward_kl"),
            "OPSD JSD(0.5)": self_taught(divergence="kind: jsd"),
            "OPSD shuffled hints": (*self_taught(), *columns(data / "shuffled.jsonl")),
            "OPSD EMA teacher": self_taught("weights: ema, decay: 0.95"),
            "OPSD live teacher": self_taught("weights: live"),
        },
        "switch": {
            "KDRL constant": (),
            "KDRL annealed": (f"algorithm.kd.coef={{kind: linear, start: 0.2, end: 0.0, over: {half}}}",),
            "OPD then GRPO": (f"stages={{opd: {{algorithm: {OPD}, {first}}}, grpo: {{{STAGE_GRPO}, {rest}}}}}",),
        },
        "offline": {
            "SFT": (*pairs, "algorithm={name: sft, reduction: sequence_mean}"),
            "SFT then REDI": (
                *pairs,
                "data.rejected_column=rejected",
                f"stages={{sft: {{algorithm: {{name: sft, reduction: sequence_mean}}, {first}}}, "
                # At SFT's rate REDI unlearns what SFT taught, since the loss on wrong answers is unbounded.
                f"redi: {{algorithm: {{name: redi}}, optim: {{lr: 3.0e-5}}, {rest}}}}}",
            ),
        },
    }


OPD = "{name: opd, group_size: 8}"
STAGE_GRPO = "algorithm: {name: grpo, group_size: 8}, teacher: {backend: none}"


def write_data(folder: Path) -> None:
    """Write shuffled.jsonl, every prompt with another one's hint, and pairs.jsonl, right and wrong answers."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, draw = task.rows("train"), random.Random(0)
    moved = [*rows[1:], *rows[:1]]
    shuffled = [row | {"privileged": other["privileged"]} for row, other in zip(rows, moved, strict=True)]
    pairs = [row | {"rejected": with_slips(row["answer"], draw)} for row in rows]
    for name, lines in (("shuffled", shuffled), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curve(folder: Path) -> Points:
    """The evaluations of a run; those of its stages are joined in order."""
    points: Points = []
    # Stages are ordered by time: each writes its metrics after the previous one.
    parts = sorted(folder.glob("**/metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    for part in parts:
        done = points[-1][0] if points else 0
        rows = [json.loads(line) for line in part.read_text().splitlines()]
        new = [(done + r["iteration"], r["eval/greedy"], r["eval/avg@k"]) for r in rows if "eval/greedy" in r]
        points += new[1:] if points else new
    return points


def run(arm: str, settings: Sequence[str], seed: int, args: argparse.Namespace, overrides: Sequence[str]) -> Points:
    """Train one arm with one seed, unless that run has finished before. Returns: its evaluations."""
    folder = Path(args.dir, re.sub(r"[^\w.]+", "-", f"{arm} {seed}"))
    staged = any(setting.startswith("stages=") for setting in settings)
    iterations = () if staged else (f"run.iterations={args.iterations}",)
    if not (folder / "finished").exists():
        subprocess.run(
            [
                *(sys.executable, "-m", "rlkd.train", "--config", "configs/quickstart.yaml"),
                *(f"run.dir={folder.parent}", f"run.name={folder.name}", f"run.seed={seed}", "run.resume=auto"),
                *(*iterations, "eval.every=10", "eval.prompts=256", "eval.path=builtin:reverse", "eval.split=heldout"),
                *("log.rollouts_every=0", *settings, *overrides),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (folder / "finished").touch()
    return curve(folder)


def first_above_half(points: Points, column: int) -> str:
    """The first iteration whose accuracy in `column` is at least HALF, or "never"."""
    return next((str(point[0]) for point in points if point[column] >= HALF), "never")


def mean_sd(values: list[float]) -> str:
    """Mean ± standard deviation of fractions, in percent."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):5.1f} ± {100 * sd:4.1f} %"


def plot(curves: dict[str, dict[str, list[Points]]], path: Path) -> None:
    """Draw group → arm → curves of its seeds into the image `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    figure, grid = pyplot.subplots(len(curves), 2, figsize=(11, 4 * len(curves)), sharey=True, squeeze=False)
    for panels, (group, arms) in zip(grid, curves.items(), strict=True):
        for axes, column, title in zip(panels, (2, 1), ("sampled (temperature 1)", "greedy"), strict=True):
            for (arm, runs), colour in zip(arms.items(), colours, strict=False):
                for i, points in enumerate(runs):
                    x, y = [p[0] for p in points], [100 * p[column] for p in points]
                    axes.plot(x, y, color=colour, alpha=0.8, label=None if i else arm)
            axes.set(xlabel="iteration", title=f"{group}: {title}", ylim=(0, 100))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("held-out accuracy, % (one line per seed)")
        panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Run all arms of the chosen groups, and print and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default="signals,opd,self,switch,offline")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--dir", default="runs/learning")
    args, overrides = parser.parse_known_args()
    data = Path(args.dir).resolve() / "data"
    write_data(data)
    every = groups(data, args.iterations)
    selected = {name: every[name] for name in args.groups.split(",")}
    curves: dict[str, dict[str, list[Points]]] = {}
    with ThreadPoolExecutor(args.jobs) as pool:

        def submitted(arm: str, settings: Sequence[str]) -> list[Callable[[], Points]]:
            return [pool.submit(run, arm, settings, seed, args, overrides).result for seed in range(args.seeds)]

        pending = {
            name: {arm: submitted(arm, settings) for arm, settings in arms.items()} for name, arms in selected.items()
        }
        for name, arms in pending.items():
            curves[name] = {}
            print(f"\n{name + ':':<20}  {'sampled':<15}  {'greedy':<15}  iterations to {HALF:.0%} sampled; greedy")
            for arm, results in arms.items():
                runs = curves[name][arm] = [result() for result in results]
                greedy, sampled = ([points[-1][i] for points in runs] for i in (1, 2))
                reached = "; ".join(", ".join(first_above_half(points, i) for points in runs) for i in (2, 1))
                print(f"{arm:<20}  {mean_sd(sampled):<15}  {mean_sd(greedy):<15}  {reached}", flush=True)
    with open(Path(args.dir, "learning.csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["group", "arm", "seed", "iteration", "greedy", "avg@k"])
        for name, by_arm in curves.items():
            for arm, runs in by_arm.items():
                table.writerows((name, arm, seed, *point) for seed, points in enumerate(runs) for point in points)
    plot(curves, Path(args.dir, "learning.png"))
    print(f"plot: {Path(args.dir, 'learning.png')}")


if __name__ == "__main__":
    main()
