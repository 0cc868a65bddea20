"""From the name of a reward in the configuration to the function."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # not at run time: workers start without pydantic
    from rlkd.config import RewardFunction

BUILTIN: Mapping[str, str] = {
    "exact_match": "rlkd.rewards.exact_match:exact_match",
    "math": "rlkd.rewards.math:math",
    "format": "rlkd.rewards.format:format",
}


def search_path() -> list[str]:
    """Where a `module:function` is looked for: this process's sys.path, and the working directory."""
    here = os.getcwd()
    return list(sys.path) if here in sys.path or "" in sys.path else [here, *sys.path]


def resolve(name: str) -> Callable[..., Any]:
    """The reward function called `name`: a builtin, or `module:function`. sys.path must hold the module.

    Raises: ValueError, one line.
    """
    module_name, colon, function_name = BUILTIN.get(name, name).partition(":")
    if not (module_name and colon and function_name):
        known = f"{', '.join(BUILTIN)}, or your own as module:function"
        raise ValueError(f"reward {name!r} is unknown{_did_you_mean(name, BUILTIN)}; there are {known}")
    if module_name == "__main__":
        raise ValueError(f"reward {name!r}: workers are processes of their own; move the function into a module")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything; its own words are the best message
        raise ValueError(f"reward {name!r}: importing {module_name} raised {one_line(error)}") from error
    found: Callable[..., Any] | None = vars(module).get(function_name)
    if found is None or not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        hint = _did_you_mean(function_name, functions)
        raise ValueError(f"reward {name!r}: module {module_name} has no function {function_name}{hint}")
    return found


def check(functions: Sequence[RewardFunction]) -> list[str]:
    """What is wrong with the rewards of a configuration, one line each; empty: they can be called.

    Imports the user's modules into this process, to fail before any model is loaded.
    """
    sys.path[:] = search_path()
    problems = []
    for function in functions:
        try:
            callable_ = resolve(function.name)
        except ValueError as error:
            problems.append(str(error))
            continue
        problems.extend(_wrong_options(function.name, callable_, function.options))
    return problems


def _wrong_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    given = {"answer", "prompt", "meta"}
    parameters = inspect.signature(function).parameters
    keywords = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    problems = []
    for option in options:
        if option in given:
            problems.append(f"reward {name!r}: {option} is given by the data and cannot be an option")
        elif option not in keywords and not anything:
            problems.append(f"reward {name!r} has no option {option!r}{_did_you_mean(option, keywords)}")
    if problems:
        return problems
    try:
        inspect.signature(function).bind("", answer="", prompt="", meta={}, **options)
    except TypeError as error:
        wanted = "f(completion, *, answer, prompt, meta, options…)"
        return [f"reward {name!r} cannot be called as {wanted}: {error}"]
    if name in BUILTIN:
        try:
            function("", answer="0", prompt="", meta={}, **options)  # ours have no side effects: options are tried out
        except Exception as error:
            return [f"reward {name!r} with options {dict(options)}: {one_line(error)}"]
    return []


def _did_you_mean(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def one_line(error: BaseException) -> str:
    """`error` as one line of at most 300 characters: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
