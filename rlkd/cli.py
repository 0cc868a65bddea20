"""The console script `rlkd`: one command for each thing that a user does. `rlkd train …` is `python -m rlkd.train …`.

Shell completion is click's: `eval "$(_RLKD_COMPLETE=bash_source rlkd)"`, or zsh_source or fish_source.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

import click

from rlkd.command_line import HELP, run

COMMANDS: Mapping[str, str] = {
    "train": "train a student",
    "evaluate": "measure held-out accuracy",
    "generate": "write completions by a run's student, or by any model",
    "push": "put a run's student on the Hugging Face hub",
    "report": "write the page of a run",
    "estimate": "print the memory that a run needs, and its GPUs",
    "serve": "start a vLLM server for trainers on other machines",
}
"""Name of each command, which is that of its module, and what it does."""


class Commands(click.Group):
    """The commands; a module is imported when its command is called, since they import different libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"rlkd.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _commands() -> Commands:
    return Commands(
        "rlkd",
        context_settings={"help_option_names": list(HELP)},
        help="Post-train language models with rewards and teachers. `rlkd COMMAND --help` explains a command.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; without arguments, list the commands. Returns: the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run(_commands(), arguments or [HELP[0]], "rlkd")


if __name__ == "__main__":
    sys.exit(main())
