"""Loads a configuration with the algorithms that exist: `rlkd.config.load` for scripts."""

from __future__ import annotations

from collections.abc import Sequence

from rlkd.algorithms.registry import known_options, learn_options
from rlkd.config import load as loading
from rlkd.config import stages
from rlkd.config.help import Algorithms, Schema
from rlkd.config.load import ConfigError, Loaded
from rlkd.config.yaml_tree import COMMAND_LINE

__all__ = ["ConfigError", "Loaded", "completions", "help_text", "load", "load_stages", "sections"]


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


def help_text(names: Sequence[str] = ("all",), algorithms: Algorithms | None = None) -> str:
    """Every dotted key of the named sections with its type, default and help, in 100 columns.

    Args:
        names: sections, kinds of a section such as kdrl or served, dotted keys, or `all`.
        algorithms: as in `load`.

    Raises: ConfigError for an unknown name.
    """
    try:
        return _schema(algorithms).help_text(names)
    except ValueError as error:
        raise ConfigError([f"{COMMAND_LINE}: {error}"]) from error


def sections() -> list[tuple[str, str]]:
    """(name, description) of every section."""
    return _schema(None).sections()


def completions(incomplete: str) -> list[str]:
    """What `key=value` may become: `key=`, or with one of the words that the key accepts."""
    return _schema(None).completions(incomplete)


def _schema(algorithms: Algorithms | None) -> Schema:
    return Schema(known_options(), others=True) if algorithms is None else Schema(algorithms)
