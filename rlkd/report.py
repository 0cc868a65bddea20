"""python -m rlkd.report runs/x: write the report of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from rlkd.command_line import Command, run


def report(run_dir: str) -> int:
    """Write report.html of a run directory, and print its path. Returns: the exit code."""
    from rlkd.reporting.report_page import write_report

    try:
        print(write_report(run_dir))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


command = Command(
    "report",
    params=[click.Argument(["run_dir"], metavar="RUN", type=click.Path())],
    callback=report,
    help="Write report.html of a run's directory, runs/<run.name>.",
)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 if the report was written (its path on stdout), 2 if it cannot be (one line on stderr)."""
    return run(command, argv, "python -m rlkd.report")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
