"""python -m rlkd.report runs/x: write the report of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlkd.reporting.report_page import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if the report was written (its path on stdout), 2 if it cannot be (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m rlkd.report", description="write report.html of a run directory")
    parser.add_argument("run_dir", help="directory of the run, runs/<run.name>")
    try:
        print(write_report(parser.parse_args(argv).run_dir))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
