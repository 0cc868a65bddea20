"""python -m rlkd.train --config X.yaml [--config Y.yaml] [key=value …]: parse, preflight, build, fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from rlkd.command_line import Command, GPUs, Words, config_option, gpus_option, missing_config, run

if TYPE_CHECKING:
    from rlkd.config.stages import Stage


def train(
    config: tuple[str, ...],
    words: tuple[str, ...],
    print_config: bool,
    estimate: GPUs | None,
    dry_run: bool,
    profile: bool,
) -> int:
    """Train, or do what a flag asks for instead. Returns: the exit code, see `main`. Raises: ConfigError."""
    from rlkd.config_file import load_stages

    if not config:
        raise missing_config(words)
    stages = load_stages(config, (*words, *(["log.profile=true"] if profile else [])))
    if print_config:
        print("---\n".join(stage.loaded.text for stage in stages), end="")
        return 0
    if estimate is not None:
        from rlkd.estimate import print_estimate

        return print_estimate(stages, estimate)
    from rlkd.planning.first_look import first_look

    problems = found_by(lambda stage: first_look(stage.loaded.config), stages)
    if not problems:
        from rlkd.planning.preflight import check

        problems = found_by(lambda stage: check(stage.loaded.config) + served_elsewhere(stage), stages)
    if problems:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node: disks and devices may differ
            print("\n".join(problems), file=sys.stderr)
        return 2
    from rlkd.console import leads
    from rlkd.distributed import RunStopped
    from rlkd.run.dry_run import dry_run as run_dry
    from rlkd.run.fit import quiet, run_stages

    if leads():
        print_plan(stages)
    quiet()
    try:
        return run_dry(stages[0]) if dry_run else run_stages(stages)
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1


def found_by(check: Callable[[Stage], list[str]], stages: Sequence[Stage]) -> list[str]:
    """The problems that `check` finds in each stage, with the stage's name."""
    return [line if stage.name is None else f"stage {stage.name}: {line}" for stage in stages for line in check(stage)]


def served_elsewhere(stage: Stage) -> list[str]:
    """The problem, if any, of a stage whose running servers cannot have the student that it starts from."""
    config = stage.loaded.config
    if stage.starts_from is None or config.rollout.backend != "vllm" or not config.rollout.server.urls:
        return []
    return [
        "rollout.server.urls: expected servers of the previous stage's student, got running servers of another model; "
        "set rollout.server.launch: true and no urls, so that each stage starts its own servers"
    ]


def print_plan(stages: Sequence[Stage]) -> None:
    """Print which process of each stage is on which GPU of this machine; nothing where it has none."""
    from rlkd.planning.gpu_plan import gpu_memory, gpu_plan

    for stage in stages if gpu_memory() else ():
        if stage.name is not None:
            print(f"stage {stage.name}")
        print(gpu_plan(stage.loaded.config, gpu_memory()).table(), flush=True)


command = Command(
    "train",
    optional=("--estimate",),
    explains_keys=True,
    params=[
        config_option(),
        click.Option(["--print-config"], is_flag=True, help="print the merged YAML with every default, and exit"),
        gpus_option(
            "--estimate",
            "print the memory that each process needs, and exit; --estimate=8x80 imagines 8 GPUs of 80 GiB",
        ),
        click.Option(
            ["--dry-run"],
            is_flag=True,
            help="load models, start servers, publish, call the rewards on one row; sample and train nothing",
        ),
        click.Option(
            ["--profile"],
            is_flag=True,
            help="trace the second iteration: <run>/trace-rank0.json.gz, for ui.perfetto.dev",
        ),
        Words("words"),
    ],
    callback=train,
    help="Train a student. Later files override earlier ones, and key=value, e.g. optim.lr=1e-5, overrides all files.",
)


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Exit code 0 for success, 2 for a wrong config or set-up (one line per mistake on stderr), 1 if the run stopped, or
    would stop on the GPUs of `--estimate`.
    """
    return run(command, argv, "python -m rlkd.train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
