"""python -m rlkd.train --config X.yaml [--config Y.yaml] [key=value …]: parse, preflight, build, fit.

`--estimate[=[GPUSx]GIB]` prints the memory that the run needs instead (planning/memory.py, planning/gpu_plan.py).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlkd.config.stages import Stage


def main(argv: list[str]) -> int:
    """Run the command line.

    Exit code 0 for success, 2 for a wrong config or set-up (one line per mistake on stderr), 1 if the run stopped, or
    would stop on the GPUs of `--estimate`.
    """
    from rlkd.config_file import ConfigError, help_text, load_stages, parse_args

    try:
        args = parse_args(argv)
        if args.help:
            print(help_text())
            return 0
        stages = load_stages(args.files, args.overrides)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(error.lines), file=sys.stderr)
        return 2
    if args.print_config:
        print("---\n".join(stage.loaded.text for stage in stages), end="")
        return 0
    if args.estimate is not None:
        return print_estimate(stages, args.estimate, args.estimate_gpus)
    from rlkd.planning.preflight import check

    problems = [
        line if stage.name is None else f"stage {stage.name}: {line}"
        for stage in stages
        for line in check(stage.loaded.config) + served_elsewhere(stage)
    ]
    if problems:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node: disks and devices may differ
            print("\n".join(problems), file=sys.stderr)
        return 2
    from rlkd.distributed import RunStopped
    from rlkd.run.fit import quiet, run_stages

    if os.environ.get("RANK", "0") == "0":
        print_plan(stages)
    quiet()
    try:
        return run_stages(stages)
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1


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


def print_estimate(stages: Sequence[Stage], gib: float, gpus: int | None) -> int:
    """Print the memory that each stage needs, and the plan of its GPUs.

    Args:
        gib: memory of a GPU; 0: that of this machine's.
        gpus: how many there are; None: as many as this machine has, or as the configuration uses.

    Returns: the exit code: 1 if a run of any stage would be refused on these GPUs.
    """
    from rlkd.planning.gpu_plan import gpu_memory, gpu_plan, too_many_trainers
    from rlkd.planning.memory import GIB, report
    from rlkd.servers.placement import seats, used

    here = gpu_memory()
    size = gib * GIB or max(here, default=0.0)
    code = 0
    for stage in stages:
        if stage.name is not None:
            print(f"stage {stage.name}")
        config = stage.loaded.config
        try:
            print(report(config, size or None))
            if not size:
                continue
            plan = gpu_plan(config, [size] * (gpus or len(here) or 1 + max(used(seats(config, gpus=1)), default=-1)))
            print(plan.table())
            problems = too_many_trainers(config, len(plan.memory)) + plan.problems() + plan.memory_problems()
        except ValueError as error:
            print(f"--estimate: {error}", file=sys.stderr)
            return 2
        if problems:
            print("\n".join(["a run on these GPUs would stop:", *problems]))
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
