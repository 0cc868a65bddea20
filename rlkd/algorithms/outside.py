"""`algorithm.name: module:Class`: user-defined algorithms from outside the package."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from typing import Any, Literal

from pydantic import Field, create_model

from rlkd.algorithms.base import Algorithm
from rlkd.algorithms.registry import ALGORITHMS
from rlkd.config.schema import AlgorithmConfig
from rlkd.rewards.registry import one_line, search_path


def learn(name: str) -> None:
    """Import the class `name` (`module:Class`) and register it in ALGORITHMS under `name`.

    Its `algorithm` section is its Options class, with `name` as the algorithm's name, so that `config.yaml` and
    checkpoints record where the class comes from. Like reward modules, it may be in the working directory.

    Raises: ValueError with a one-line message.
    """
    if name in ALGORITHMS:
        return
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name or module_name.startswith("."):
        raise ValueError("expected module:Class; e.g. my_algorithm:MyAlgorithm for the class in my_algorithm.py")
    sys.path[:] = search_path()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything; show its own message
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
    _register(name, found)


def _register(name: str, found: type[Algorithm]) -> None:
    """Define a subclass of `found` whose Options have the name `name`; subclassing `Algorithm` registers it."""
    options = getattr(found, "Options", None)
    if not (isinstance(options, type) and issubclass(options, AlgorithmConfig)):
        raise ValueError(
            f"{found.__name__} has no Options; define Options as a subclass of rlkd.config.AlgorithmConfig"
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
    """` at FILE:LINE` of the innermost frame with a source file; empty if the module was not found."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames[1:] if not frame.filename.startswith("<")]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
