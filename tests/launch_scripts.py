"""Helpers for tests of the launch scripts: the commands that a script prints, and whether the programs accept them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.run import get_args_parser

from rlkd.command_line import parse
from rlkd.config_file import load
from rlkd.serve import command as serve
from rlkd.serve import plan
from rlkd.train import command as train

SNAPSHOTS = Path(__file__).with_name("launch_snapshots")
CONFIG = ("--config", "configs/quickstart_vllm.yaml")
OVERRIDES = ("run.name=a.b", "rollout.max_tokens=12", "reward.functions=[{name: exact_match}]")


def with_python(folder: Path, programs: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment that has `python`, this interpreter, and other programs, by the bodies of their scripts."""
    for name, body in {"python": 'exec "$REAL_PYTHON" "$@"', **(programs or {})}.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "REAL_PYTHON": sys.executable, "HEAD": "127.0.0.1"}


def rendered(environment: Mapping[str, str], *command: str, **more: str) -> str:
    """The output of a launch script that is told only to print its commands."""
    variables = {**environment, **more, "DRY_RUN": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout


def assert_snapshot(name: str, text: str) -> None:
    path = SNAPSHOTS / f"{name}.txt"
    assert text == path.read_text(), f"if this is intended, write to {path}:\n{text}"


def assert_known(line: str) -> None:
    """Check that torchrun, the trainer and the server accept every option and that the configuration is valid."""
    words = shlex.split(line)
    module = words.index("-m") + 1
    if words[module] == "rlkd.serve":
        plan(**parse(serve, words[module + 1 :]))
        return
    known = get_args_parser().parse_args(words[module + 1 :])
    assert (words[module], known.module, known.training_script) == ("torch.distributed.run", True, "rlkd.train")
    args = parse(train, known.training_script_args)
    config = load(args["config"], args["words"]).config
    assert config.run.resume == "auto"
    assert (config.trainer.devices, config.trainer.num_nodes) == (int(known.nproc_per_node), int(known.nnodes[:1]))
