"""Loads a configuration with the algorithms that exist: `rlkd.config.load` for scripts."""

from __future__ import annotations

from collections.abc import Sequence

from rlkd.algorithms.registry import known_options, learn_options
from rlkd.config import load as loading
from rlkd.config import stages
from rlkd.config.help import Algorithms
from rlkd.config.load import Args, ConfigError, Loaded, parse_args

__all__ = ["Args", "ConfigError", "Loaded", "help_text", "load", "load_stages", "parse_args"]


def load(files: Sequence[str], overrides: Sequence[str] = (), algorithms: Algorithms | None = None) -> Loaded:
    """The configuration of YAML `files`, later ones on top, and `a.b=c` `overrides` on top of them.

    Args:
        algorithms: name → class of the `algorithm` section; None: the built-in algorithms, those that other code
            defines, and any module:Class.

    Raises: ConfigError with one line per mistake.
    """
    if algorithms is not None:
        return loading.load(files, overrides, algorithms)
    return loading.load(files, overrides, known_options(), learn_options)


def load_stages(files: Sequence[str], overrides: Sequence[str] = ()) -> list[stages.Stage]:
    """The stages of a configuration, all checked; a run without stages is one stage.

    Raises: ConfigError with one line per mistake of the first wrong stage.
    """
    return stages.load_stages(files, overrides, known_options(), learn_options)


def help_text(algorithms: Algorithms | None = None) -> str:
    """Every dotted key with its type, default and help, in 100 columns. `algorithms`: as in `load`."""
    if algorithms is not None:
        return loading.help_text(algorithms)
    return loading.help_text(known_options(), others=True)
