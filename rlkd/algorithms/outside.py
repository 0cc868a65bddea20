"""`algorithm.name: module:Class`: an algorithm from a file of the user, outside the package."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from typing import Any, Literal

from pydantic import Field, create_model

from rlkd.algorithms.base import ALGORITHMS, Algorithm
from rlkd.config.schema import AlgorithmConfig
from rlkd.rewards.registry import one_line, search_path


def learn(name: str) -> None:
    """Make the class that `name` (`module:Class`) means known in ALGORITHMS, under `name` itself.

    Its section of a config is its own Options, whose `name` is then `name`: so `config.yaml` and checkpoints say where
    the class comes from. The module is looked for in the working directory too, as a reward's is.

    Raises: ValueError, one line.
    """
    if name in ALGORITHMS:
        return
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name or module_name.startswith("."):
        raise ValueError("expected module:Class; e.g. my_algorithm:MyAlgorithm for the class in my_algorithm.py")
    sys.path[:] = search_path()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything; its own words are the best message
        raise ValueError(f"importing {module_name} raised {one_line(error)}{_where(error)}") from error
    found = vars(module).get(class_name)
    if found is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        near = difflib.get_close_matches(class_name, classes, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"module {module_name} has no class {class_name}{hint}")
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ValueError(
            f"{class_name} of {module_name}: expected a subclass of rlkd.algorithms.base.Algorithm; derive it from "
            "that, or from an algorithm such as rlkd.algorithms.grpo.GRPO"
        )
    _call(name, found)


def _call(name: str, found: type[Algorithm]) -> None:
    """Define a subclass of `found` whose Options are called `name`, which makes it known (`Algorithm`)."""
    options = getattr(found, "Options", None)
    if not (isinstance(options, type) and issubclass(options, AlgorithmConfig)):
        raise ValueError(
            f"{found.__name__} has no Options; give it Options = a subclass of rlkd.config.AlgorithmConfig, its section"
        )
    field: Any = (Literal[name], Field(description=name))
    type(
        found.__name__,
        (found,),
        {
            "Options": create_model(options.__name__, __base__=options, __doc__=options.__doc__, name=field),
            "__doc__": found.__doc__,
            "__module__": found.__module__,
        },
    )


def _where(error: BaseException) -> str:
    """The last line of a source file that was running; nothing where an import found no file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames[1:] if not frame.filename.startswith("<")]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
