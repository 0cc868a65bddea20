"""Checks that a refactoring changes no number of a set of runs by a single bit.

    python benchmarks/same_numbers.py run before.jsonl
    python benchmarks/same_numbers.py run after.jsonl
    python benchmarks/same_numbers.py compare before.jsonl after.jsonl

Start it in the root of the checkout to run; `--only NAME …` selects some of the runs. Each run is a
`python -m rlkd.train` on the CPU with the built-in models, and gives one line of output: its metrics except times,
memory and throughput, and the SHA-256 of each tensor of the exported student, of each tensor of the last checkpoint
(optimizer moments included) and of each file of rollouts. Compare only results from the same machine with the same
versions of torch and its libraries.

The script imports nothing from rlkd, so it needs no change when the package changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AT_A_TIME = 2
"""Runs at the same time, each with one process per rank."""

UNSTABLE = re.compile(r"(^|/)(time|times|timestamp|seconds|memory|tokens_per_s)(/|$)")
"""Matches names of metrics that differ from run to run."""

SHARED = (
    *("run.name=run", "log.progress=false", "log.wandb=off", "log.rollouts_every=1", "checkpoint.every=0"),
    *("trainer.accelerator=cpu", "run.iterations=3"),
)
SMALL = (
    *("model.path=builtin:teacher", "data.path=DATA", "data.id_column=null", "rollout.max_mismatch=0.001"),
    *("rollout.backend=hf", "rollout.server.launch=false", "rollout.server.devices=[[]]"),
    *("rollout.prompts=8", "rollout.max_tokens=12", "reward.functions=[{name: exact_match}]"),
    *("data.max_prompt_tokens=32", "data.max_completion_tokens=16"),
    *("trainer.precision=fp32", "eval.every=0"),
)
"""Overrides that run a shipped GPU config on the CPU. The student is the built-in teacher: it is the only built-in
model right often enough for groups with both right and wrong answers, without which all advantages would be 0."""
SAMPLED = ("rollout.temperature=0.7",)
"""At this temperature the student is right about half of the time."""
FASTER = ("optim.lr=3.0e-4",)
"""Large enough that an iteration changes what the next one samples."""
LOCAL = ("teacher={backend: local, path: 'builtin:student'}",)
"""A teacher that is a different model from the student."""
PREFERRED = ("teacher={backend: local, path: 'builtin:teacher'}", "model.path=builtin:student")
NO_REFERENCE = "template: '{prompt}{context}', max_tokens: 64"
HINT = f"{NO_REFERENCE}, reference: ' hint: {{text}}'"
FEEDBACK = (
    "algorithm.feedback={system: null, user: '{question} answer: {response}', behaviours: [], glue: ' ', "
    "pattern: '(?P<opinion>yes|no); (?P<reason>wait, [a-z ]+); (?P<phrase>so: [a-z]+)', max_tokens: 36, "
    "max_prompt_tokens: 72}"
)


@dataclass(frozen=True)
class Run:
    """One training command, or two in sequence on the same run directory."""

    files: tuple[str, ...]
    """Names of files in configs/, without the extension."""
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    then: tuple[str, ...] = ()
    """Overrides that the second command adds to those of the first; empty: there is only one command."""


RUNS = {
    # the quickstart, and the features of the trainer that it can exercise
    "quickstart": Run(("quickstart",)),
    "two_ranks": Run(("quickstart",), ("trainer.devices=2",), ranks=2),
    "two_ranks_ema_lora": Run(
        ("quickstart",),
        (
            *("trainer.devices=2", "model.path=builtin:teacher", *SAMPLED, "trainer.micro_batch_tokens=512"),
            *("model.lora={r: 4, alpha: 8}", "teacher={backend: self, weights: ema, decay: 0.5}", "eval.every=0"),
            f"algorithm={{name: sdpo, context: {{sibling: ' hint: {{text}}', {NO_REFERENCE}}}}}",
            *("teacher.temperature=0.7", "trainer.updates_per_iteration=2"),
        ),
        ranks=2,
    ),
    "straight": Run(("quickstart",), ("run.iterations=4", "eval.every=2")),
    "resumed": Run(
        ("quickstart",),
        ("run.iterations=2", "eval.every=2"),
        then=("run.iterations=4", "run.resume=auto"),
    ),
    "bf16": Run(("quickstart",), ("trainer.precision=bf16", "rollout.max_mismatch=1.0", "eval.every=0")),
    "micro_batches": Run(("quickstart",), ("trainer.micro_batch_tokens=256", "eval.every=0")),
    # every other shipped config
    "quickstart_vllm": Run(
        ("quickstart_vllm",),
        (*PREFERRED, "rollout.backend=hf", "rollout.server.launch=false", "eval.every=0"),
    ),
    "grpo": Run(("grpo",), (*SMALL, *SAMPLED, *FASTER)),
    "cispo": Run(("cispo",), (*SMALL, *SAMPLED, *FASTER)),
    "drgrpo": Run(("drgrpo",), (*SMALL, *SAMPLED, *FASTER)),
    "gspo": Run(("gspo",), (*SMALL, *SAMPLED, *FASTER)),
    "rloo": Run(("rloo",), (*SMALL, *SAMPLED, *FASTER)),
    "dapo": Run(  # dynamic sampling, 16 updates an iteration
        ("dapo",),
        (
            *(*SMALL, *SAMPLED, "reward.functions=[{name: exact_match, weight: 2.0}]", "rollout.temperature=0.5"),
            *("algorithm.overlong_cache=4", "algorithm.resample_rounds=4"),
        ),
    ),
    "kdrl": Run(("kdrl",), (*SMALL, *SAMPLED, *FASTER, *LOCAL, "teacher.temperature=0.7")),
    "kdrl_lora": Run(("kdrl", "kdrl_lora"), (*SMALL, *SAMPLED, *LOCAL, "teacher.temperature=0.7")),
    "opd": Run(("opd",), (*SMALL, *FASTER, *PREFERRED)),
    "gkd": Run(("opd", "gkd"), (*SMALL, *FASTER, *PREFERRED)),
    "opd_then_grpo": Run(("opd", "opd_then_grpo"), (*SMALL, *FASTER, *LOCAL, "run.iterations=2")),
    "opsd": Run(("opsd",), (*SMALL, *FASTER, "teacher.dtype=float32", f"algorithm.context={{{HINT}}}")),
    "sdpo": Run(  # context: a correct sibling
        ("opsd", "sdpo"),
        (
            *(*SMALL, *SAMPLED, "teacher.temperature=0.7", "teacher.dtype=float32"),
            f"algorithm.context={{sibling: ' hint: {{text}}', {NO_REFERENCE}}}",
        ),
    ),
    "sft": Run(("sft",), (*SMALL, *FASTER)),
    "redi": Run(("sft", "redi"), SMALL),
    "taid": Run(("sft", "taid"), (*SMALL, *PREFERRED)),
    "thinktuning": Run(
        ("thinktuning",),
        (*SMALL, *SAMPLED, *FASTER, "teacher={backend: local, path: 'builtin:mentor'}", FEEDBACK),
    ),
    "thinktuning_tiny": Run(("thinktuning_tiny",), ("eval.every=0",)),
    # options that no shipped config sets
    "grpo_terms": Run(
        ("grpo",),
        (
            *(*SMALL, *SAMPLED, *FASTER, "trainer.micro_batch_tokens=1100", "trainer.updates_per_iteration=2"),
            *("algorithm.entropy_coef=0.01", "algorithm.reference_coef=0.05", "algorithm.importance=mask"),
            *("algorithm.mask_truncated=true", "algorithm.reduction=sequence_mean", "algorithm.overlong_cache=2"),
        ),
    ),
    "kdrl_advantage": Run(
        ("kdrl",),
        (*SMALL, *SAMPLED, *FASTER, *LOCAL, "teacher.temperature=0.7", "algorithm.kd={form: advantage, coef: 0.1}"),
    ),
    "kdrl_mask": Run(
        ("kdrl",),
        (
            *(*SMALL, *SAMPLED, *FASTER, *LOCAL, "teacher.temperature=0.7"),
            "algorithm.kd={estimator: k3, coef: 0.1, mask: response, denominator: kept}",
        ),
    ),
    "opd_top_k": Run(("opd",), (*SMALL, *FASTER, *PREFERRED, "algorithm.divergence={tier: top_k, k: 8}")),
    "opd_sampled": Run(("opd",), (*SMALL, *FASTER, *PREFERRED, "algorithm.divergence={tier: sampled}")),
    "gkd_teacher": Run(("opd", "gkd"), (*SMALL, *FASTER, *PREFERRED, "algorithm.others=teacher")),
    "opsd_live": Run(
        ("opsd",),
        (*SMALL, *FASTER, "teacher.dtype=float32", "teacher.weights=live", f"algorithm.context={{{HINT}}}"),
    ),
    "thinktuning_shaped": Run(
        ("thinktuning_tiny",),
        ("eval.every=0", "algorithm.teacher_tokens=shaped", "algorithm.glue_tokens=sft"),
    ),
}


def write_data(path: Path) -> None:
    """Write words to reverse, under every column name that the shipped configs use."""
    draw, lines = random.Random(0), []
    for _ in range(64):
        word = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(4, 8)))
        asked = dict.fromkeys(("prompt", "problem", "question"), f"reverse: {word}")
        right = dict.fromkeys(("answer", "solution", "chosen"), word[::-1])
        lines.append(json.dumps(asked | right | {"rejected": word}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def commands(run: Run, folder: Path, data: Path) -> Iterator[list[str]]:
    """The command lines of `run`, in order."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={run.ranks}", "-m"] if run.ranks > 1 else []
    files = [part for file in run.files for part in ("--config", f"configs/{file}.yaml")]
    overrides = [text.replace("DATA", str(data)) for text in (*SHARED, *run.overrides, f"run.dir={folder}")]
    for more in ((), run.then) if run.then else ((),):
        yield [sys.executable, "-m", *launch, "rlkd.train", *files, *last_of_each(overrides + list(more))]


def last_of_each(overrides: list[str]) -> list[str]:
    """One override per key: the last value wins."""
    return list({text.partition("=")[0]: text for text in overrides}.values())


def perform(name: str, folder: Path, data: Path) -> dict[str, Any]:
    """Run `name`. Returns: its line of output, with the numbers or the reason for the failure."""
    began = time.monotonic()
    tree = os.getcwd()
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([tree, *filter(None, [os.environ.get("PYTHONPATH")])])
    for command in commands(RUNS[name], folder, data):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            line = {"name": name, "failed": done.stderr[-3000:]}
            break
    else:
        line = {"name": name} | numbers(folder)
    print(f"{name}: {'FAILED' if 'failed' in line else 'done'} after {time.monotonic() - began:.0f} s", flush=True)
    if "failed" in line:
        print(line["failed"], file=sys.stderr, flush=True)
    return line


def numbers(folder: Path) -> dict[str, Any]:
    """The numbers in the run directory `folder`; the names start with the folder of their stage."""
    found: dict[str, Any] = {"metrics": {}, "weights": {}, "checkpoint": {}, "rollouts": {}}
    for metrics in sorted(folder.rglob("metrics.jsonl")):
        where = metrics.parent
        label = str(where.relative_to(folder))
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        found["metrics"][label] = [stable(row) for row in rows]
        for weights in sorted(where.glob("hf/*.safetensors")) + sorted(where.glob("adapter/*.safetensors")):
            found["weights"] |= hashes(f"{label}/{weights.parent.name}", saved_weights(weights))
        found["checkpoint"] |= hashes(label, checkpoint_tensors(max(where.glob("checkpoints/iteration-*"))))
        for dump in sorted(where.glob("rollouts/*.jsonl")):
            rows = [stable(json.loads(line)) for line in dump.read_text(encoding="utf-8").splitlines()]
            text = json.dumps(rows, sort_keys=True)
            found["rollouts"][f"{label}/{dump.name}"] = hashlib.sha256(text.encode()).hexdigest()
    if not found["metrics"] or not found["weights"]:
        raise RuntimeError(f"{folder}: expected metrics.jsonl and exported weights, got at most one of them")
    return found


def stable(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics of `row` that do not differ from run to run."""
    return {name: value for name, value in row.items() if not UNSTABLE.search(name)}


def saved_weights(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, by name."""
    from safetensors.torch import load_file

    return load_file(path)


def checkpoint_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, unsharded, by the names under which they are saved."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in saved.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def hashes(label: str, tensors: dict[str, Any]) -> dict[str, str]:
    """`label`/name → SHA-256 of the dtype, shape and bits of each tensor."""
    import torch

    found = {}
    for name, tensor in sorted(tensors.items()):
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found[f"{label}/{name}"] = digest.hexdigest()
    return found


def run_all(out: Path, names: list[str]) -> int:
    """Write a line per run. Returns: 1 if one failed, 2 outside of a checkout, else 0."""
    if not Path("rlkd/__init__.py").exists():
        print(f"expected the root of a checkout, got {os.getcwd()}; start the script there", file=sys.stderr)
        return 2
    began = time.monotonic()
    warnings.filterwarnings(
        "ignore", message="torch.distributed is disabled"
    )  # intended: one process reads the checkpoint
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_A_TIME) as pool:
        data = Path(folder, "data.jsonl")
        write_data(data)
        failed = []
        with out.open("w", encoding="utf-8") as file:
            for line in pool.map(lambda name: perform(name, Path(folder, name), data), names):
                print(json.dumps(line), file=file, flush=True)
                failed += [line["name"]] if "failed" in line else []
    print(f"{len(names)} runs in {time.monotonic() - began:.0f} s; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def compare(before: Path, after: Path) -> int:
    """Print a line for each run in either file. Returns: 1 if one differs, failed or is missing,
    or if there is none, else 0."""
    old, new = read(before), read(after)
    verdicts = {name: verdict(old.get(name), new.get(name)) for name in [*old, *(new.keys() - old.keys())]}
    for name, text in verdicts.items():
        print(f"{name}: {text}")
    return int(not verdicts or any(text != "equal" for text in verdicts.values()))


def read(path: Path) -> dict[str, Any]:
    """Name of the run → its line in the file."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["name"]: line for line in lines}


def verdict(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """`equal`, or the first thing that differs, with both values."""
    for line, which in ((before, "before"), (after, "after")):
        if line is None:
            return f"missing {which}"
        if "failed" in line:
            return f"failed {which}: {(line['failed'].splitlines() or ['no message'])[-1]}"
    return next(differences(before, after), "equal")


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Every leaf that differs, in the order of `before`. NaN equals NaN; 0 and −0, 1 and 1.0 differ."""
    missing = object()
    if isinstance(before, list) and isinstance(after, list):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            at = f"{where} {key}".strip()
            if before.get(key, missing) is missing or after.get(key, missing) is missing:
                yield f"{at} is only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], at)
    elif repr(before) != repr(after):
        yield f"{where} was {before!r}, is {after!r}"


def main(argv: list[str]) -> int:
    """Run or compare, as the command line says. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run", help="write the numbers of the checkout in the current directory")
    runs.add_argument("out", type=Path)
    runs.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    comparison = actions.add_parser("compare", help="print which runs differ, and the first difference of each")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    args = parser.parse_args(argv)
    return run_all(args.out, args.only) if args.action == "run" else compare(args.before, args.after)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
