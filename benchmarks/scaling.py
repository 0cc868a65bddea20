"""The cost model of docs/scaling.md: its constants on this box, a check against real runs, and the plan for GPUs.

python benchmarks/scaling.py constants      rates of this box, by micro-benchmarks
python benchmarks/scaling.py check          one more round of constants and runs; predicted and measured seconds
python benchmarks/scaling.py plan           predictions for 8, 64 and 1,024 H100s; runs nothing

A round of `check` takes about ten minutes on two busy cores; rounds accumulate in runs/scaling/measured.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cost_model as cost
import scaling_plan
from cost_model import Machine, Model, Update, dense

FOLDER = Path("runs/scaling")
VOCABULARY = 2048
"""Large enough that a random student seldom samples the end token, so completions have the requested length."""
SIZES = {"1M": (128, 4, 352), "6M": (256, 6, 704), "21M": (512, 6, 1408)}
"""Name → hidden, layers, intermediate."""
RANK = 8
"""Rank of the adapters."""
ITERATIONS = 4
"""Measured iterations of a run, after one more that warms up."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training run."""

    name: str
    student: str
    prompts: int
    length: int
    teacher: str | None = None
    algorithm: str = "grpo"
    updates: int = 1
    lora: bool = False
    ranks: int = 1

    @property
    def rows(self) -> int:
        """Completions of one rank."""
        return self.prompts * 8 // self.ranks


CASES = (
    Case(name="1M, 64 × 32", student="1M", prompts=8, length=32),
    Case(name="1M, 16 × 96", student="1M", prompts=2, length=96),
    Case(name="6M, 32 × 32", student="6M", prompts=4, length=32),
    Case(name="21M, 16 × 16", student="21M", prompts=2, length=16),
    Case(name="6M, 2 updates", student="6M", prompts=4, length=32, updates=2),
    Case(name="6M, LoRA", student="6M", prompts=4, length=32, lora=True),
    Case(name="1M, 6M teacher", student="1M", prompts=8, length=32, teacher="6M", algorithm="kdrl"),
    Case(name="1M, full KD", student="1M", prompts=4, length=32, teacher="6M", algorithm="opd"),
    Case(name="6M, 2 ranks", student="6M", prompts=4, length=32, ranks=2),
)


# ---- constants of this box ------------------------------------------------------------------------------------------


def mean_seconds(act: Callable[[], Any]) -> float:
    """Mean seconds of a call, over calls that together take half a second or more.

    The mean, not the median: other jobs share this box. They slow down every long run, but only some of many short
    calls, so a median would hide them.
    """
    act()
    calls, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < 0.5:
        act()
        calls += 1
    return taken / calls


def rates() -> dict[str, float]:
    """FLOP/s, bytes/s and exponentials/s of one process, and seconds per logit of a draw."""
    import torch
    from torch.nn import functional as F

    from rlkd.generation.hf import draw

    products = []
    for rows, width in ((32, 256), (1024, 128), (1024, 256), (1024, 512)):  # shapes of a decode step, and of training
        x, w = torch.randn(rows, width), torch.randn(4 * width, width)
        products.append(8 * rows * width**2 / mean_seconds(lambda x=x, w=w: F.linear(x, w)))
    small, factor = torch.randn(2, 2**20)  # 4 MiB, like activations; their results are new tensors, too
    large, other, result = torch.randn(3, 2**24)  # 64 MiB
    logits, noise = torch.randn(32, VOCABULARY, dtype=torch.float64), torch.rand(32, dtype=torch.float64)
    return {
        "flops": statistics.median(products),
        "cache": 12 * small.numel() / mean_seconds(lambda: small * factor),
        "memory": 12 * large.numel() / mean_seconds(lambda: torch.add(large, other, out=result)),
        "exps": small.numel() / statistics.fmean(mean_seconds(f) for f in (small.exp, lambda: F.silu(small))),
        "draw": mean_seconds(lambda: draw(logits, noise, 1.0)) / logits.numel(),
    }


def disks() -> dict[str, float]:
    """Bytes/s of writing and reading a safetensors file of 64 MiB, in shared memory and on the disk (with fsync)."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, found = {"weights": torch.randn(2**24)}, {}
    for name, parent in (("shm", "/dev/shm"), ("disk", ".")):
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            path = Path(folder, "weights.safetensors")

            def write(path: Path = path) -> None:
                save_file(weights, path)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

            found[f"{name}_write"] = 2**26 / mean_seconds(write)
            found[f"{name}_read"] = 2**26 / mean_seconds(lambda path=path: load_file(path)["weights"].clone())
    return found


def fixed(lora: bool) -> dict[str, float]:
    """Seconds that do not depend on sizes, measured with rlkd's own code on one token and models of width 32.

    Models of one and of nine layers separate the costs per layer from the others. Every rank calls it.
    """
    import lightning
    import numpy as np
    import torch
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.device_mesh import init_device_mesh

    from rlkd.config.schema import LoraConfig, ModelConfig, TrainerConfig
    from rlkd.generation.hf import decode
    from rlkd.models.logprob_head import Needs
    from rlkd.models.student import build_student, load_causal_lm
    from rlkd.models.weights import copy_into
    from rlkd.teachers.local import LocalScorer
    from rlkd.teachers.teacher import ScoreRequest
    from rlkd.types import Batch, Signal

    del lightning, ModelParallelStrategy  # imported as a run imports them, since they change torch's threading
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("data_parallel",))
    mask = torch.tensor([[False, True]])
    batch = Batch(
        iteration=0,
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        lengths=torch.tensor([2]),
        prompt_lengths=torch.ones(1, dtype=torch.int64),
        group=torch.zeros(1, dtype=torch.int64),
        completion_mask=mask,
        student_mask=mask,
        authors=torch.zeros(1, 2, dtype=torch.int64),
        sampler_logprobs=torch.zeros(1, 2),
        advantages=torch.zeros(1, 2),
        rewards=torch.zeros(1),
        weight_version=torch.zeros(1, dtype=torch.int64),
    )
    noise = np.random.default_rng(0).random((1, 33))
    seconds: dict[int, dict[str, float]] = {}
    for layers in (1, 9):
        path = str(model_folder(f"thin{layers}", 32, layers, 32, vocabulary=64))
        adapters = LoraConfig(r=RANK) if lora else None
        student = build_student(ModelConfig(path=path, lora=adapters), TrainerConfig(), mesh, 0)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
        sampler = load_causal_lm(path, torch.float32, attention=None, trust_remote_code=False)
        scorer = LocalScorer(
            path,
            vocabulary=64,
            temperature=1.0,
            batch_tokens=64,
            dtype=torch.float32,
            accelerator="cpu",
            attention=None,
            trust_remote_code=False,
        )
        scorer.open()

        def update(student=student, optimizer=optimizer, trained=trained) -> None:
            optimizer.zero_grad()
            student(batch, Needs(temperature=1.0)).logprobs.sum().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0).full_tensor()
            optimizer.step()

        def publish(student=student, sampler=sampler) -> None:
            copy_into(sampler, student.weights())

        def steps(sampler=sampler) -> None:
            decode(sampler, 64, [[2]], noise, 1.0, [-1])

        def forward(scorer=scorer) -> None:
            scorer.score([ScoreRequest((2,), (2,))], Signal())

        acts = {"update": update, "publish": publish, "step": steps, "forward": forward}
        seconds[layers] = {name: mean_of(act, 20) for name, act in acts.items()}
        seconds[layers]["step"] /= noise.shape[1]
    found = {}
    for name in seconds[1]:
        found[f"{name}_layer"] = (seconds[9][name] - seconds[1][name]) / 8
        found[name] = seconds[1][name] - found[f"{name}_layer"]
    return found


def mean_of(act: Callable[[], Any], calls: int) -> float:
    """Mean seconds of `calls` calls; the number is fixed, since all ranks must make equally many collective calls."""
    act()
    act()
    started = time.perf_counter()
    for _ in range(calls):
        act()
    return (time.perf_counter() - started) / calls


def link(ranks: int) -> dict[str, float]:
    """Bytes/s that a rank receives in an all-gather of 16 MiB."""
    import torch

    if ranks == 1:
        return {}
    part = torch.randn(2**22 // ranks)
    gathered = torch.empty(2**22 // ranks * ranks)
    gather = torch.distributed.all_gather_into_tensor
    taken = mean_of(lambda: gather(gathered, part), 20)
    return {"link": 4 * (gathered.numel() - part.numel()) / taken}


def measure_here() -> None:
    """Run one rank of `constants` and print its result as a line of JSON."""
    import torch

    ranks = int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    found = rates() | link(ranks) | fixed(lora=False)
    if ranks == 1:
        found |= {f"lora_{name}": value for name, value in fixed(lora=True).items()} | disks()
    torch.distributed.destroy_process_group()
    print("constants " + json.dumps(found), flush=True)


def constants(ranks: int) -> dict[str, float]:
    """Constants of `ranks` processes that work at the same time; the median over them."""
    done = run_python([__file__, "measure"], ranks)
    return medians([json.loads(line.split(" ", 1)[1]) for line in done.splitlines() if line.startswith("constants ")])


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each name over all rows."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def run_python(arguments: list[str], ranks: int) -> str:
    """The stdout of `python ARGUMENTS` in `ranks` processes of one process group. Raises: CalledProcessError."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    if ranks == 1 and arguments[0] == "-m":  # a single process needs no rendezvous
        command = [sys.executable, *arguments]
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    done.check_returncode()
    return done.stdout


# ---- runs -----------------------------------------------------------------------------------------------------------


def model_folder(name: str, hidden: int, layers: int, width: int, vocabulary: int = VOCABULARY) -> Path:
    """A random Llama with the built-in tokenizer, on disk."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlkd.builtin import resolve

    folder = FOLDER / "models" / name
    if (folder / "config.json").exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin:student"))
    # Embedding rows without a token would be left out of sampling and losses, but large vocabularies are to be timed.
    tokenizer.add_tokens([f"<filler {i}>" for i in range(vocabulary - len(tokenizer))])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=width,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    staging = Path(tempfile.mkdtemp(dir=folder.parent if folder.parent.mkdir(parents=True, exist_ok=True) else None))
    LlamaForCausalLM(config).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    os.replace(staging, folder)
    return folder


def measured(case: Case) -> list[dict[str, float]]:
    """The rows of metrics.jsonl of a new run, without the first iteration, which warms up."""
    folder = FOLDER / "run"
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [
        *(f"run.dir={FOLDER}", "run.name=run", f"run.iterations={ITERATIONS + 1}"),
        f"model.path={FOLDER}/models/{case.student}",
        f"algorithm={{name: {case.algorithm}, group_size: 8}}",
        f"teacher={{backend: local, path: {FOLDER}/models/{case.teacher}, batch_tokens: 16384}}"
        if case.teacher
        else "teacher={backend: none}",
        *(f"rollout.prompts={case.prompts}", f"rollout.max_tokens={case.length}", "optim.lr=1e-6"),
        *(f"trainer.updates_per_iteration={case.updates}", f"trainer.devices={case.ranks}"),
        *(("model.lora={r: 8}",) if case.lora else ()),
        *("eval.every=0", "checkpoint.every=0", "checkpoint.export=false", "log.rollouts_every=0"),
    ]
    run_python(["-m", "rlkd.train", "--config", "configs/quickstart.yaml", *overrides], case.ranks)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["iteration"] > 1]


PHASES = ("rollout", "teacher", "train", "publish")


def predicted(case: Case, machine: Machine, models: dict[str, Model], prompt: float) -> dict[str, float]:
    """Predicted seconds of each phase."""
    student, rows, length = models[case.student], case.rows, prompt + case.length
    tokens = rows * length
    adapters = cost.adapter_numbers(student, RANK) if case.lora else 0.0
    projected = float(rows * case.length)
    one = Update(
        tokens=tokens / case.updates,
        projected=projected / case.updates,
        length=length,
        micro_batches=1,
        ranks=case.ranks,
        adapters=adapters,
    )
    full = models[case.teacher] if case.teacher and case.algorithm == "opd" else None
    train = case.updates * cost.training(student, machine, one, full)
    if case.updates > 1:  # the log-probs before the first update
        train += cost.scoring(student, machine, tokens, projected, length, 1)
    teacher = 0.0
    if case.teacher:
        teacher = cost.scoring(models[case.teacher], machine, tokens, projected, length, 1)
    return {
        "rollout": cost.rollout(student, machine, rows, prompt, case.length, group=8),
        "teacher": teacher,
        "train": train,
        "publish": cost.publishing(student, machine, case.ranks, case.lora),
    }


def check() -> None:
    """Measure one more round of constants and runs, then print predictions and measurements of all rounds."""
    from rlkd.config.schema import DataConfig
    from rlkd.data.chat import load_tokenizer
    from rlkd.data.sources import load_source
    from rlkd.planning.memory import shape_of

    paths = {name: str(model_folder(name, *size)) for name, size in SIZES.items()}
    models = {name: dense(shape_of(path), heads=SIZES[name][0] // 32) for name, path in paths.items()}
    task = DataConfig(path="builtin:reverse", max_prompt_tokens=32)
    prompt = statistics.fmean(len(p.token_ids) for p in load_source(task, load_tokenizer(paths["1M"], False)))
    for ranks in (1, 2):
        mine = [case for case in CASES if case.ranks == ranks]
        for i, case in enumerate(mine):
            if i % 4 == 0:  # the load of other jobs changes, so constants are measured between the runs, too
                record({"constants": constants(ranks), "ranks": ranks})
            record({"case": case.name, "rows": measured(case)})
        record({"constants": constants(ranks), "ranks": ranks})
    report(models, prompt)


def record(result: dict[str, Any]) -> None:
    """Append `result` to measured.jsonl."""
    with open(FOLDER / "measured.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def report(models: dict[str, Model], prompt: float) -> None:
    """Print two tables: medians of all rounds; and the fastest iterations with the constants of the quietest moment,
    since other jobs on this box can only add time."""
    results = [json.loads(line) for line in (FOLDER / "measured.jsonl").read_text().splitlines()]
    sets = {ranks: [r["constants"] for r in results if r.get("ranks") == ranks] for ranks in (1, 2)}
    rows = {case.name: [row for r in results if r.get("case") == case.name for row in r["rows"]] for case in CASES}
    print(f"{len(next(iter(rows.values())))} or more iterations of each run")
    table(
        "median", {n: medians(of) for n, of in sets.items()}, {n: medians(of) for n, of in rows.items()}, models, prompt
    )
    quiet = {n: max(of, key=lambda values: values["flops"]) for n, of in sets.items()}
    fastest = {n: min(of, key=lambda row: row["time/total"]) for n, of in rows.items()}
    table("quietest", quiet, fastest, models, prompt)


def table(
    name: str,
    of: dict[int, dict[str, float]],
    rows: dict[str, dict[str, float]],
    models: dict[str, Model],
    prompt: float,
) -> None:
    """Print predicted and measured seconds.

    Args:
        of: number of processes → constants.
        rows: run → metrics of an iteration.
    """
    print(f"\n{name}")
    for ranks, values in of.items():
        print(f"{ranks} processes: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
    errors: dict[str, list[float]] = {name: [] for name in (*PHASES, "total")}
    print(f"{'predicted / measured, s':<24}" + "".join(f"{name:>20}" for name in errors))
    for case in CASES:
        guess = predicted(case, machine(of[case.ranks], case.lora), models, prompt)
        guess["total"] = sum(guess.values())
        cells = []
        for phase in errors:
            if guess[phase] == 0:
                cells.append("–")
                continue
            real = rows[case.name][f"time/{phase}"]
            errors[phase].append(abs(guess[phase] / real - 1))
            cells.append(f"{guess[phase]:.2f}/{real:.2f} {100 * (guess[phase] / real - 1):+.0f}%")
        print(f"{case.name:<24}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{'median |error|':<24}" + "".join(f"{100 * statistics.median(e):>19.0f}%" for e in errors.values()))


def machine(values: dict[str, float], lora: bool) -> Machine:
    """The Machine with these constants; `lora`: with the fixed costs of a student with adapters where they differ."""
    if lora:
        replaced = ("update", "update_layer", "publish", "publish_layer")
        values = values | {name: values[f"lora_{name}"] for name in replaced}
    return Machine(**{name: value for name, value in values.items() if name in Machine.__dataclass_fields__})


def main() -> None:
    """Run the action given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("constants", "check", "plan", "measure"))
    what = parser.parse_args().what
    if what == "measure":
        measure_here()
    elif what == "constants":
        for ranks in (1, 2):
            print(f"{ranks} processes: {json.dumps(constants(ranks), indent=1)}")
    elif what == "check":
        check()
    else:
        scaling_plan.plan()


if __name__ == "__main__":
    main()
