"""What each objective learns on the built-in task, side by side: GRPO, distillation only, KDRL.

python benchmarks/learning.py [--seeds 3] [--iterations 150] [--dir runs/learning] [key=value …]

Same student, prompts, iterations, learning rate and sampler. Prints mean ± standard deviation of the held-out accuracy
and the iterations to 50 %, and writes learning.csv and learning.png beside the runs. Finished runs are reused.
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
    "KD only": ("algorithm.policy_coef=0",),
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


def mean_sd(values: list[float]) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):5.1f} ± {100 * sd:4.1f} %"


def plot(curves: dict[str, list[list[tuple[int, float, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (arm, runs), colour in zip(curves.items(), ("#D55E00", "#0072B2", "#009E73"), strict=True):
        for i, points in enumerate(runs):
            axes.plot(
                [p[0] for p in points],
                [100 * p[1] for p in points],
                color=colour,
                alpha=0.8,
                label=arm if not i else None,
            )
    axes.set(
        xlabel="iteration", ylabel="held-out greedy accuracy, %", ylim=(0, 100), title="Built-in task, one line a seed"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--dir", default="runs/learning")
    args, overrides = parser.parse_known_args()
    curves: dict[str, list[list[tuple[int, float, float]]]] = {}
    print(f"{'':<8}  {'greedy':<15}  {'avg@k':<15}  iterations to {HALF:.0%} greedy, by seed")
    for arm in ARMS:
        curves[arm] = [run(arm, seed, args, overrides) for seed in range(args.seeds)]
        reached = [next((str(t) for t, greedy, _ in points if greedy >= HALF), "never") for points in curves[arm]]
        greedy, sampled = ([points[-1][i] for points in curves[arm]] for i in (1, 2))
        print(f"{arm:<8}  {mean_sd(greedy):<15}  {mean_sd(sampled):<15}  {', '.join(reached)}", flush=True)
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
