"""What each objective learns on the built-in task, side by side: GRPO, distillation only, KDRL.

python benchmarks/learning.py [--seeds 3] [--iterations 200] [--dir runs/learning] [key=value …]

Same student, prompts, iterations, learning rate and sampler. Prints mean ± standard deviation of the held-out accuracy
(sampled at temperature 1, and greedy) and the iterations to 50 %, and writes learning.csv and learning.png beside the
runs. Finished runs are reused.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

ARMS = {
    "GRPO": ("algorithm={name: grpo, group_size: 8}",),
    "KD only": ("algorithm.policy_coef=0", "algorithm.kd.coef=1"),
    "KDRL": (),
}
HALF = 0.5


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """(iteration, greedy accuracy, avg@k) of every evaluation of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["iteration"], r["eval/greedy"], r["eval/avg@k"]) for r in rows if "eval/greedy" in r]


def run(arm: str, seed: int, args: argparse.Namespace, overrides: list[str]) -> list[tuple[int, float, float]]:
    folder = Path(args.dir, f"{arm.replace(' ', '-')}-{seed}")
    if not (folder / "hf").exists():
        subprocess.run(
            [
                *(sys.executable, "-m", "rlkd.train", "--config", "configs/quickstart.yaml"),
                *(f"run.dir={folder.parent}", f"run.name={folder.name}", f"run.seed={seed}", "run.resume=auto"),
                *(f"run.iterations={args.iterations}", "eval.every=10", "eval.prompts=256", "log.rollouts_every=0"),
                *(*ARMS[arm], *overrides),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return curve(folder)


def first_above_half(points: list[tuple[int, float, float]], column: int) -> str:
    return next((str(point[0]) for point in points if point[column] >= HALF), "never")


def mean_sd(values: list[float]) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):5.1f} ± {100 * sd:4.1f} %"


def plot(curves: dict[str, list[list[tuple[int, float, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, column, title in zip(panels, (2, 1), ("sampled (temperature 1)", "greedy"), strict=True):
        for (arm, runs), colour in zip(curves.items(), ("#D55E00", "#0072B2", "#009E73"), strict=True):
            for i, points in enumerate(runs):
                x, y = [p[0] for p in points], [100 * p[column] for p in points]
                axes.plot(x, y, color=colour, alpha=0.8, label=None if i else arm)
        axes.set(xlabel="iteration", title=title, ylim=(0, 100))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy, % (one line a seed)")
    panels[0].legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--dir", default="runs/learning")
    args, overrides = parser.parse_known_args()
    curves: dict[str, list[list[tuple[int, float, float]]]] = {}
    print(f"{'':<8}  {'sampled':<15}  {'greedy':<15}  iterations to {HALF:.0%} sampled, and greedy, by seed")
    for arm in ARMS:
        curves[arm] = [run(arm, seed, args, overrides) for seed in range(args.seeds)]
        greedy, sampled = ([points[-1][i] for points in curves[arm]] for i in (1, 2))
        reached = "; ".join(", ".join(first_above_half(points, i) for points in curves[arm]) for i in (2, 1))
        print(f"{arm:<8}  {mean_sd(sampled):<15}  {mean_sd(greedy):<15}  {reached}", flush=True)
    with open(Path(args.dir, "learning.csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["arm", "seed", "iteration", "greedy", "avg@k"])
        table.writerows(
            (arm, seed, *point) for arm, runs in curves.items() for seed, points in enumerate(runs) for point in points
        )
    plot(curves, Path(args.dir, "learning.png"))
    print(f"plot: {Path(args.dir, 'learning.png')}")


if __name__ == "__main__":
    main()
