"""The command line of rlkd.train: parses flags, file names and `key=value` arguments; opens no file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlkd.config.errors import ConfigError
from rlkd.config.yaml_tree import COMMAND_LINE

_GIB = re.compile(r"(?:([1-9]\d{0,2})x)?(?=.*[1-9])(\d+(?:\.\d+)?)")
"""[GPUSx]GIB, neither of which is 0."""
_FLAGS = ("--config", "--print-config", "--estimate", "--profile", "--help")


@dataclass(frozen=True)
class Args:
    """The parsed command line."""

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    print_config: bool
    help: bool
    estimate: float | None
    """Memory of a GPU in GiB; 0: that of this machine's; None: no estimate requested."""
    estimate_gpus: int | None = None
    """GPUs of the machine to estimate for; None: this machine's, or those that the configuration names."""


def parse_args(argv: Sequence[str]) -> Args:
    """`--config A.yaml [--config B.yaml …] [key=value …]`, with any of the flags
    `--print-config --estimate[=[GPUSx]GIB] --profile --help`.

    Raises: ConfigError for an unknown flag, or if no --config is given.
    """
    files, overrides, lines = [], [], []
    print_config = help = False
    estimate: float | None = None
    estimate_gpus: int | None = None
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        if flag == "--config" and (equals or (rest and not rest[0].startswith("-"))):
            files.append(value if equals else rest.pop(0))
        elif flag == "--config":
            lines.append(f"{COMMAND_LINE}: --config: expected a YAML file, got nothing")
        elif argument == "--print-config":
            print_config = True
        elif argument == "--profile":
            overrides.append("log.profile=true")
        elif argument in ("--help", "-h"):
            help = True
        elif argument == "--estimate":
            estimate = 0.0
        elif flag == "--estimate" and (size := _GIB.fullmatch(value)) is not None:
            estimate_gpus = int(size[1]) if size[1] else None
            estimate = float(size[2])
        elif flag == "--estimate":
            lines.append(
                f"{COMMAND_LINE}: --estimate: expected the memory of a GPU in GiB, got {value!r}; e.g. --estimate=80, "
                "or --estimate=8x80 for 8 GPUs"
            )
        elif flag.startswith("-") and "." in flag and equals:
            lines.append(f"{COMMAND_LINE}: {flag}: unknown flag; did you mean {argument.lstrip('-')}?")
        elif flag.startswith("-"):
            near = difflib.get_close_matches(flag, _FLAGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_FLAGS)} or key=value"
            lines.append(f"{COMMAND_LINE}: {flag}: unknown flag; {hint}")
        else:
            overrides.append(argument)
    if not files and not help and not lines:
        guess = [argument for argument in overrides if argument.endswith((".yaml", ".yml")) and "=" not in argument]
        hint = f"did you mean --config {guess[0]}?" if guess else "e.g. --config configs/quickstart.yaml"
        lines.append(f"{COMMAND_LINE}: --config: missing; {hint}")
    if lines:
        raise ConfigError(lines)
    return Args(tuple(files), tuple(overrides), print_config, help, estimate, estimate_gpus)
