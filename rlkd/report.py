"""rlkd report runs/a runs/b: write the page of a run, or of several laid over each other; --serve lists runs, live."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from rlkd.command_line import Command, run

PORT = 8642
"""Where `--serve` listens, unless told otherwise."""


def report(runs: Sequence[str], out: str | None, serve: bool, port: int | None) -> int:
    """Write the page of `runs` to `out`, or serve the pages of all runs in a folder.

    Returns: the exit code.
    """
    from rlkd.reporting.report_page import write_report
    from rlkd.reporting.server import server

    try:
        if not serve:
            if port is not None:
                raise ValueError("--port: expected --serve with it, got none; add --serve")
            print(write_report(*runs, out=out))
            return 0
        if len(runs) != 1 or out is not None:
            raise ValueError("--serve: expected one folder of runs and no --out; e.g. rlkd report --serve runs/")
        with server(Path(runs[0]), PORT if port is None else port) as listening:
            print(f"http://127.0.0.1:{listening.server_port}/  (ends with Ctrl-C)", flush=True)
            listening.serve_forever()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


command = Command(
    "report",
    params=[
        click.Argument(["runs"], metavar="RUN …", type=click.Path(), nargs=-1, required=True),
        click.Option(
            ["--out"],
            metavar="FILE",
            type=click.Path(),
            help="where to; else report.html in the run, or compare.html beside several runs",
        ),
        click.Option(
            ["--serve"], is_flag=True, help="list the runs in the folder RUN, live, for a browser on this machine"
        ),
        click.Option(
            ["--port"], type=click.IntRange(0, 65535), help=f"of --serve; {PORT} unless given, 0: any free one"
        ),
    ],
    callback=report,
    help="Write report.html of a run's directory, runs/<run.name>, or one page that lays several runs over each other.",
)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 if the report was written (its path on stdout), 2 if it cannot be (one line on stderr)."""
    return run(command, argv, "python -m rlkd.report")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
