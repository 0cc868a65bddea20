"""The command lines of rlkd, parsed by click: every mistake is one line. Opens no file and imports no torch."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import CompletionItem

from rlkd.config.errors import ConfigError
from rlkd.config.yaml_tree import COMMAND_LINE

_SIZE = re.compile(r"(?:([1-9]\d{0,2})x)?(?=.*[1-9])(\d+(?:\.\d+)?)")
"""[GPUSx]GIB, neither of which is 0."""
HELP = ("--help", "-h")
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


@dataclass(frozen=True)
class GPUs:
    """GPUs to imagine."""

    gib: float = 0.0
    """Memory of each in GiB; 0: that of this machine's."""
    count: int | None = None
    """None: this machine's, or those that the configuration names."""


class _GPUs(click.ParamType[GPUs]):
    """[GPUSx]GIB; an empty text means this machine's GPUs."""

    name = "[GPUSx]GIB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> GPUs:
        """Parse a text. Fails with one line."""
        if isinstance(value, GPUs):
            return value
        if not value:
            return GPUs()
        size = _SIZE.fullmatch(value)
        if size is None:
            self.fail(
                f"expected the memory of a GPU in GiB, got {value!r}; e.g. --estimate=80, or --estimate=8x80 for "
                "8 GPUs",
                param,
                ctx,
            )
        return GPUs(float(size[2]), int(size[1]) if size[1] else None)


class _File(click.ParamType[str]):
    """The name of a file, which no option is."""

    name = "FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself. Fails with one line."""
        if value.startswith("-"):
            self.fail(f"expected a FILE, got {value}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shell's own file names."""
        return [CompletionItem(incomplete, type="file")]


class Words(click.Argument):
    """The arguments that are no options: `key=value`, and what a command takes beside them."""

    def __init__(self, name: str, metavar: str = "[key=value …]") -> None:
        super().__init__([name], nargs=-1, metavar=metavar)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The keys of the configuration, or the words that a key accepts; file names where there are none."""
        from rlkd.config_file import completions  # the schema of all algorithms

        found = completions(incomplete)
        return [CompletionItem(word) for word in found] or [CompletionItem(incomplete, type="file")]


class Command(click.Command):
    """A command with options of which the value is optional: without `=`, they do not take the next argument for it."""

    def __init__(self, name: str, *, optional: Sequence[str] = (), explains_keys: bool = False, **options: Any) -> None:
        """
        Args:
            optional: those options; `--option` alone means an empty value.
            explains_keys: whether `--help` may be followed by names of sections and keys, and lists the sections.
            options: of `click.Command`.
        """
        context = {"help_option_names": list(HELP), "max_content_width": 100}
        super().__init__(name, context_settings=context, **options)
        self._optional = optional
        self._explains_keys = explains_keys

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse `args` into `ctx.params`, or print the keys that are asked for."""
        asked = next((i for i, word in enumerate(args) if word in HELP), len(args))
        names = [word for word in args[asked + 1 :] if not word.startswith("-") and "=" not in word]
        if self._explains_keys and names:
            from rlkd.config_file import help_text  # the schema of all algorithms

            click.echo(help_text(names), nl=False)
            ctx.exit()
        return super().parse_args(ctx, [f"{one}=" if one in self._optional else one for one in args])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of sections."""
        if self._explains_keys:
            from rlkd.config_file import sections

            with formatter.section("Sections of keys (--help SECTION explains them, --help all every key)"):
                formatter.write_dl(sections())


def config_option() -> click.Option:
    """`--config FILE`, which may be repeated."""
    about = "YAML file; several are merged, later ones override earlier ones"
    return click.Option(["--config"], multiple=True, type=_File(), help=about)


def gpus_option(flag: str, about: str) -> click.Option:
    """An option that describes GPUs; without it, None."""
    return click.Option([flag], type=_GPUs(), help=about)


def run(command: click.Command, argv: Sequence[str], name: str | None = None) -> int:
    """Run a command line: parse it and call the command.

    Returns: what the command returns; 2 after a mistake, with one line each on stderr, once in a torchrun group;
        130 after Ctrl-C.
    """
    try:
        return int(command.main(list(argv), prog_name=name or f"rlkd {command.name}", standalone_mode=False) or 0)
    except click.ClickException as error:
        lines = [_line(error, command)]
    except ConfigError as error:
        lines = error.lines
    except (click.Abort, KeyboardInterrupt):  # click makes an Abort of Ctrl-C
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), file=sys.stderr)
    return 2


def parse(command: click.Command, argv: Sequence[str]) -> dict[str, Any]:
    """The parameters of a command line, by name. Raises: ConfigError, one line."""
    try:
        return command.make_context(command.name, list(argv)).params
    except click.ClickException as error:
        raise ConfigError([_line(error, command)]) from error


def missing_config(words: Sequence[str]) -> ConfigError:
    """The mistake of a command line without --config, of which `words` are the arguments."""
    guess = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    hint = f"did you mean --config {guess[0]}?" if guess else "e.g. --config configs/quickstart.yaml"
    return ConfigError([f"{COMMAND_LINE}: --config: missing; {hint}"])


def _line(error: click.ClickException, command: click.Command) -> str:
    """A mistake in the arguments as one line."""
    context = getattr(error, "ctx", None)
    command = command if context is None else context.command
    options = [param for param in command.params if isinstance(param, click.Option)]
    match error:
        case click.exceptions.NoSuchCommand(command_name=name):
            assert isinstance(command, click.Group)
            problem = _unknown(name, "command", command.list_commands(click.Context(command)))
        case click.NoSuchOption(option_name=flag) if "." in flag:
            problem = f"{flag}: unknown flag; did you mean {flag.lstrip('-')}=VALUE?"
        case click.NoSuchOption(option_name=flag):
            words = any(isinstance(param, Words) for param in command.params)
            known = [*(flag for option in options for flag in option.opts), HELP[0]]
            problem = _unknown(flag, "flag", known, " or key=value" if words else "")
        case click.BadOptionUsage(option_name=flag):
            problem = f"{flag}: expected a value, got nothing"
        case click.BadParameter(param=click.Parameter() as param):
            problem = f"{param.opts[0]}: {error.message or f'missing; see {HELP[0]}'}"
        case _:
            problem = error.format_message()
    return f"{COMMAND_LINE}: {' '.join(problem.split())}"


def _unknown(name: str, what: str, known: Sequence[str], others: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}{others}"
    return f"{name}: unknown {what}; {hint}"
