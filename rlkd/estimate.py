"""python -m rlkd.estimate --config X.yaml [--gpus [GPUSx]GIB] [key=value …]: the memory that a run needs, and its GPUs.

`python -m rlkd.train --estimate` does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkd.command_line import Command, GPUs, Words, config_option, gpus_option, missing_config, run

if TYPE_CHECKING:
    from rlkd.config.stages import Stage


def estimate(config: tuple[str, ...], gpus: GPUs | None, words: tuple[str, ...]) -> int:
    """Print the estimate of each stage. Returns: the exit code. Raises: ConfigError."""
    from rlkd.config_file import load_stages

    if not config:
        raise missing_config(words)
    return print_estimate(load_stages(config, words), gpus or GPUs())


def print_estimate(stages: Sequence[Stage], gpus: GPUs) -> int:
    """Print the memory that each stage needs, and the plan of its GPUs.

    Returns: the exit code: 1 if a run of any stage would be refused on these GPUs.
    """
    from rlkd.planning.gpu_plan import gpu_memory, gpu_plan, too_many_trainers
    from rlkd.planning.memory import GIB, report
    from rlkd.servers.placement import seats, used

    here = gpu_memory()
    size = gpus.gib * GIB or max(here, default=0.0)
    code = 0
    for stage in stages:
        if stage.name is not None:
            print(f"stage {stage.name}")
        config = stage.loaded.config
        try:
            print(report(config, size or None))
            if not size:
                continue
            count = gpus.count or len(here) or 1 + max(used(seats(config, gpus=1)), default=-1)
            plan = gpu_plan(config, [size] * count)
            print(plan.table())
            problems = too_many_trainers(config, len(plan.memory)) + plan.problems() + plan.memory_problems()
        except ValueError as error:
            print(f"--estimate: {error}", file=sys.stderr)
            return 2
        if problems:
            print("\n".join(["a run on these GPUs would stop:", *problems]))
            code = 1
    return code


command = Command(
    "estimate",
    optional=("--gpus",),
    params=[
        config_option(),
        gpus_option("--gpus", "the GPUs to imagine, e.g. 8x80 for 8 of 80 GiB; by default this machine's"),
        Words("words"),
    ],
    callback=estimate,
    help="Print the memory that each process of a run needs, what is on which GPU, and whether it fits.",
)


def main(argv: Sequence[str]) -> int:
    """Run the command line. Exit code 0 if it fits or no GPU is known, 1 if a run would stop, 2 after a mistake."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
