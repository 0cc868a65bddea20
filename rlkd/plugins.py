"""Parts from outside the package by name: `module:Name`, or a name that an installed package declares.

All registries use this file. It imports nothing but the standard library, and reads no package's metadata before a name
is asked for that is not built in.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rlkd.raised import place

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What a name stands for."""

    group: str
    """The group of entry points in which packages declare names."""
    what: str
    form: str
    example: str


ALGORITHM = Kind("rlkd.algorithms", "class", "module:Class", "my_algorithm:MyAlgorithm")
REWARD = Kind("rlkd.rewards", "function", "module:function", "my_rewards:my_reward")
DATA_SOURCE = Kind("rlkd.data_sources", "class or function", "module:Class", "my_data:MyData")
TEACHER = Kind("rlkd.teachers", "class", "module:Class", "my_teacher:MyTeacher")
SAMPLER = Kind("rlkd.samplers", "class", "module:Class", "my_sampler:MySampler")


def search_path() -> list[str]:
    """The folders in which modules are searched: this process's sys.path and the working directory."""
    here = os.getcwd()
    return list(sys.path) if here in sys.path or "" in sys.path else [here, *sys.path]


def is_outside(name: str, kind: Kind) -> bool:
    """Whether `name` has the form module:Name, or an installed package declares it."""
    return ":" in name or bool(_declared(kind, name))


def installed(kind: Kind) -> list[str]:
    """The names that installed packages declare, sorted. None of them is imported."""
    return sorted({entry.name for entry in _declared(kind)})


def find(name: str, kind: Kind, use: Callable[[Any], T]) -> T:
    """What `use` makes of the class or function that `name` stands for, which `is_outside`.

    It is looked up in its module each time, so that one that is defined again, in a notebook or by importlib.reload,
    replaces the first.

    Raises: ValueError with a one-line message, also for a ValueError of `use`, which names the package at fault.
    """
    if ":" in name:
        return use(_named(name, kind))
    entries = _declared(kind, name)
    packages = [f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed package" for entry in entries]
    if len(entries) > 1:
        raise ValueError(f"{name!r} is declared by {' and by '.join(packages)}; write {kind.form} instead")
    try:
        return use(_named(entries[0].value.partition("[")[0].replace(" ", ""), kind))
    except ValueError as error:
        raise ValueError(
            f"package {packages[0]} declares {name!r} as {entries[0].value}, but {error}; repair or uninstall it"
        ) from error


def _declared(kind: Kind, name: str | None = None) -> list[EntryPoint]:
    """The entry points of `name`, or of all names."""
    from importlib.metadata import entry_points  # here, since it reads the metadata of every installed package

    return [*(entry_points(group=kind.group) if name is None else entry_points(group=kind.group, name=name))]


def _named(name: str, kind: Kind) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        file = kind.example.partition(":")[0]
        raise ValueError(f"expected {kind.form}; e.g. {kind.example} for the {kind.what} in {file}.py")
    sys.path[:] = search_path()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything; show its own message
        absent = isinstance(error, ModuleNotFoundError) and error.name == module_name
        hint = "; start in the folder of that file, or add the folder to PYTHONPATH" if absent else ""
        raise ValueError(f"importing {module_name} raised {one_line(error)}{place(error)}{hint}") from error
    found = vars(module).get(attribute)
    if not callable(found):
        hint = did_you_mean(attribute, [key for key, value in vars(module).items() if callable(value)])
        if module_name == "__main__":
            hint = "; move it from the notebook or script that defines it into a file"
        raise ValueError(f"module {module_name} has no {kind.what} {attribute}{hint}")
    return found


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing if no known name is near."""
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def one_line(error: BaseException) -> str:
    """`error` as one line of at most 300 characters: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
