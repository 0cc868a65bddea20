"""What the GPU tests start: samplers with their own vLLM server, and runs through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from vllm_fixtures import EOS

from rlkd.config.schema import Config
from rlkd.config_file import load
from rlkd.generation.vllm import VLLMSampler
from rlkd.planning.gpu_plan import gpu_plan
from rlkd.planning.memory import GIB

ROOT = Path(__file__).parents[1]
QUICK = 'rollout.server.extra_args=["--enforce-eager"]'
"""For servers whose speed does not matter: they start in half the time."""


def checked(files: Sequence[str], overrides: Sequence[str], gpus: int = 1) -> Config:
    """The configuration, which must be one that GPUs of 80 GiB can run. Needs the models' small files only."""
    config = load([str(ROOT / "configs" / f"{name}.yaml") for name in files], list(overrides)).config
    plan = gpu_plan(config, [80 * GIB] * gpus)
    assert plan.problems() + plan.memory_problems() == []
    return config


def sampling_config(path: str, folder: Path, *overrides: str, gpus: int = 1) -> Config:
    """A sampler with a server of its own, in bf16 with 0.3 of GPU 0; overrides come last."""
    settings = (
        *(f"model.path={path}", f"run.dir={folder}", "run.name=sampled", "teacher=null", "trainer.accelerator=gpu"),
        *("algorithm={name: grpo}", "data.chat_template=false", "rollout.max_tokens=24", QUICK),
        *("rollout.server.memory=0.3", "rollout.server.dtype=bfloat16", "rollout.server.max_model_len=null"),
    )
    return checked(["quickstart_vllm"], [*settings, *overrides], gpus)


@contextmanager
def serving(config: Config) -> Iterator[VLLMSampler]:
    """The sampler of `config`, with servers that end with the block."""
    sampler = VLLMSampler(config, [EOS])
    try:
        sampler.start()
        sampler.open()
        yield sampler
    finally:
        sampler.close()


def used_gib() -> float:
    """What all processes together use of GPU 0."""
    free, total = torch.cuda.mem_get_info(0)
    return (total - free) / GIB


def resident_gib(*pids: int) -> float:
    """Main memory of these processes and all that they started."""
    trees = [[process, *process.children(recursive=True)] for process in map(psutil.Process, pids)]
    return sum(process.memory_info().rss for tree in trees for process in tree) / GIB


def command(*arguments: str, ranks: int = 1) -> list[str]:
    """`python -m rlkd.train ARGUMENTS`, by torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), "-m", "rlkd.train", *arguments]


def start(line: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a run, with all its output in `log`."""
    with open(log, "wb") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen[bytes], log: Path, seconds: float, expected: Sequence[int] = (0,)) -> str:
    """The output of a run that must end within `seconds` with one of the `expected` exit codes."""
    try:
        code = run.wait(seconds)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGTERM)
        time.sleep(1)
        run.kill()
        run.wait()
        code = None
    output = log.read_text(errors="replace")
    assert code in expected, f"exit code {code} (None: not within {seconds:g} s) of {log}: {output[-3000:]}"
    return output


def train(folder: Path, *arguments: str, ranks: int = 1, seconds: float = 115) -> list[dict[str, float]]:
    """A run that must succeed; the rows of its metrics. It needs `run.dir={folder}` and `run.name=run`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.txt"
    finish(start(command(*arguments, ranks=ranks), log), log, seconds)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def write_data(folder: Path, rows: int = 64) -> str:
    """A file of problems in single characters, each of which the tokenizer of `save_tokenizer` knows."""
    path = folder / "data.jsonl"
    lines = [
        {"problem": "".join(chr(60 + (7 * i + 5 * t) % 60) for t in range(8 + i % 9)), "answer": "7"}
        for i in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)
