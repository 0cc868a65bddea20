"""Does the student adopt the teacher's feedback after training on it? ThinkTuning's losses compared with GRPO.

python benchmarks/thinktuning.py [--seeds 3] [--iterations 100] [--jobs 1] [--dir runs/thinktuning] [key=value …]

The teacher is a frozen copy of the student that is shown the student's answers, and it writes a word that the student
never writes (`task.MARKER`). For each loss on the teacher's tokens, prints how often the student writes that word
without the teacher after training (held-out prompts, sampled at temperature 1) and the fraction of right answers, mean
± standard deviation over the seeds. Also writes thinktuning.csv. Finished runs are reused.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from learning import mean_sd

from rlkd.builtin import task
from rlkd.config.schema import Config
from rlkd.config_file import load
from rlkd.data.chat import completion_text, load_tokenizer
from rlkd.data.heldout import heldout_prompts
from rlkd.generation.hf import HFSampler
from rlkd.generation.sampler import Sampling, eos_ids
from rlkd.models.student import load_causal_lm
from rlkd.models.weights import Whole
from rlkd.rewards.exact_match import exact_match

CONFIG = "configs/thinktuning_tiny.yaml"
ARMS = {
    "GRPO": ("algorithm={name: grpo, group_size: 8}", "teacher=null"),
    "mask": ("algorithm.teacher_tokens=mask",),
    "ppo": ("algorithm.teacher_tokens=ppo",),
    "shaped 0 to 0.1": ("algorithm.teacher_tokens=shaped", "algorithm.shaping=[0.0, 0.1]"),
    "shaped 0 to 0.001": ("algorithm.teacher_tokens=shaped", "algorithm.shaping=[0.0, 0.001]"),
    "sft": ("algorithm.teacher_tokens=sft",),
}
SAMPLES = 4


def unaided(config: Config, folder: Path) -> tuple[float, float, float]:
    """SAMPLES completions of every held-out prompt by the student in `folder`.

    Returns: the fraction with the marker, the fraction that is right, and the fraction of those with the marker that is
    right.
    """
    tokenizer = load_tokenizer(str(folder))
    sampler = HFSampler(config, eos_ids(str(folder), False))
    sampler.open()
    model = load_causal_lm(str(folder), torch.float32, attention=None, trust_remote_code=False)
    sampler.publish(Whole(model.state_dict()), 0)
    sampling = Sampling(temperature=1.0, max_tokens=config.rollout.max_tokens, seed=10**6)
    groups = sampler.sample(heldout_prompts(config, tokenizer), n=SAMPLES, iteration=0, sampling=sampling)
    marked, right = [], []
    for rollout in (r for group in groups for r in group):
        text = completion_text(tokenizer, rollout.token_ids, rollout.finish_reason)
        marked.append(task.MARKER in text)
        right.append(exact_match(text, answer=rollout.prompt.answer, prompt="", meta={}, after=task.CONCLUSION) == 1.0)
    both = sum(m and r for m, r in zip(marked, right, strict=True))
    return sum(marked) / len(marked), sum(right) / len(right), both / max(sum(marked), 1)


def run(arm: str, seed: int, args: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Train one arm with one seed, unless its export exists. Returns: its row of the table."""
    folder = Path(args.dir, f"{arm.replace(' ', '-')}-{seed}")
    settings = [
        *(f"run.dir={folder.parent}", f"run.name={folder.name}", f"run.seed={seed}", "run.resume=auto"),
        *(f"run.iterations={args.iterations}", "eval.prompts=256", "eval.every=0", "log.rollouts_every=0"),
        *(*ARMS[arm], *overrides),
    ]
    if not (folder / "hf").exists():
        command = [sys.executable, "-m", "rlkd.train", "--config", CONFIG, *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    marker, right, right_of_marked = unaided(load([CONFIG], settings).config, folder / "hf")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    guided = [row["guided/reward"] for row in rows if "guided/reward" in row]
    return {
        "marker": marker,
        "right": right,
        "right of marked": right_of_marked,
        "reward of guided": statistics.fmean(guided) if guided else 0.0,
    }


def main() -> None:
    """Run all arms, print the table and write it to thinktuning.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--dir", default="runs/thinktuning")
    args, overrides = parser.parse_known_args()
    columns = ("marker", "right", "right of marked", "reward of guided")
    print(f"{'':<18}" + "".join(f"  {column:<16}" for column in columns))
    Path(args.dir).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool, open(Path(args.dir, "thinktuning.csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["arm", "seed", *columns])
        pending = {arm: [pool.submit(run, arm, seed, args, overrides) for seed in range(args.seeds)] for arm in ARMS}
        for arm, runs in pending.items():
            found = [one.result() for one in runs]
            table.writerows([arm, seed, *row.values()] for seed, row in enumerate(found))
            print(f"{arm:<18}" + "".join(f"  {mean_sd([f[c] for f in found]):<16}" for c in columns), flush=True)


if __name__ == "__main__":
    main()
