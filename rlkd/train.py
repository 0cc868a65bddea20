"""python -m rlkd.train --config X.yaml [--config Y.yaml] [key=value …]: parse, preflight, build, fit.

`--estimate[=GIB]` prints the memory that the run needs instead (planning/memory.py).
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

    Exit code 0 for success, 2 for a wrong config or set-up (one line per mistake on stderr), 1 if the run stopped.
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
        return print_estimate(stages, args.estimate)
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


def print_estimate(stages: Sequence[Stage], device_gib: float) -> int:
    """Print the memory that each stage needs. `device_gib`: 0 for this machine's GPU. Returns: the exit code."""
    from rlkd.planning.memory import GIB, device_memory, report

    for stage in stages:
        if stage.name is not None:
            print(f"stage {stage.name}")
        try:
            print(report(stage.loaded.config, device_gib * GIB or device_memory()))
        except ValueError as error:
            print(f"--estimate: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
