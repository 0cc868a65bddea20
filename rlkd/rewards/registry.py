"""The function for each name in `reward.functions`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # not at run time: workers start without pydantic
    from rlkd.config.schema import RewardFunction

BUILTIN: Mapping[str, str] = {
    "exact_match": "rlkd.rewards.exact_match:exact_match",
    "math": "rlkd.rewards.math_answer:math",
    "format": "rlkd.rewards.format_match:format",
}

SIGNATURE = "f(completion, *, answer, prompt, meta, **options) -> float"
GIVEN = ("answer", "prompt", "messages", "meta")
"""The keyword arguments of every reward; `messages` only if the function accepts it."""

_WRITTEN_FOR = {
    "completions": "for a batch, as TRL's are",
    "prompts": "for a batch, as TRL's are",
    "solution_str": "for verl",
    "solution_strs": "for verl",
    "ground_truth": "for verl",
    "ground_truths": "for verl",
}
_LISTS = re.compile(r"(?:\w+\.)*(?:list|sequence|iterable)\b", re.IGNORECASE)


def search_path() -> list[str]:
    """The folders in which `module:function` is searched: this process's sys.path and the working directory."""
    here = os.getcwd()
    return list(sys.path) if here in sys.path or "" in sys.path else [here, *sys.path]


def resolve(name: str) -> Callable[..., Any]:
    """The reward function called `name`: a builtin, or `module:function` with a module on sys.path.

    Raises: ValueError, one line.
    """
    module_name, colon, function_name = BUILTIN.get(name, name).partition(":")
    if not (module_name and colon and function_name):
        known = f"{', '.join(BUILTIN)}, or your own as module:function"
        raise ValueError(f"reward {name!r} is unknown{_did_you_mean(name, BUILTIN)}; use one of {known}")
    if module_name == "__main__":
        raise ValueError(f"reward {name!r}: workers are processes of their own; move the function into a module")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise ValueError(f"reward {name!r}: importing {module_name} raised {one_line(error)}") from error
    found: Callable[..., Any] | None = vars(module).get(function_name)
    if found is None or not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        hint = _did_you_mean(function_name, functions)
        raise ValueError(f"reward {name!r}: module {module_name} has no function {function_name}{hint}")
    return found


def check(functions: Sequence[RewardFunction]) -> list[str]:
    """The problems with the rewards of a configuration, one line each; empty if all can be called.

    Imports the user's modules into this process, so that errors appear before any model is loaded.
    """
    sys.path[:] = search_path()
    problems = []
    for function in functions:
        try:
            callable_ = resolve(function.name)
            takes_messages(callable_)
        except ValueError as error:
            problems.append(str(error))
            continue
        problems.extend(_wrong_options(function.name, callable_, function.options))
    return problems


def takes_messages(function: Callable[..., Any]) -> bool:
    """Whether `function` has a keyword `messages`, or accepts any keyword.

    Raises: ValueError, one line, if Python does not know its signature.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {function!r}: {error}; wrap it in a function {SIGNATURE}") from error
    keywords = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind == p.VAR_KEYWORD or (p.name == "messages" and p.kind in keywords) for p in parameters)


def _wrong_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    signature = inspect.signature(function)
    parameters = signature.parameters
    keywords = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    foreign = _foreign(signature)
    if foreign is not None:
        return [
            f"reward {name!r} {foreign}; expected {SIGNATURE}, called with one completion; other columns are in meta"
        ]
    problems = []
    for option in options:
        if option in GIVEN:
            problems.append(f"reward {name!r}: {option} is given by the data and cannot be an option")
        elif option not in keywords and not anything:
            problems.append(f"reward {name!r} has no option {option!r}{_did_you_mean(option, keywords)}")
    if problems:
        return problems
    try:
        given = {key: None for key in GIVEN if key != "messages" or takes_messages(function)}
        signature.bind("", **given, **options)
    except TypeError as error:
        return [
            f"reward {name!r} cannot be called as {SIGNATURE}: {error}; other columns of the data are in meta, and "
            "options in reward.functions"
        ]
    if name in BUILTIN:
        try:
            function(
                "", answer="0", prompt="", meta={}, **options
            )  # ours have no side effects, so the options are tried
        except Exception as error:
            return [f"reward {name!r} with options {dict(options)}: {one_line(error)}"]
    return []


def _foreign(signature: inspect.Signature) -> str | None:
    """What in the signature shows that it was written for another library or a batch; None if nothing does."""
    for parameter in signature.parameters.values():
        if parameter.name in _WRITTEN_FOR and parameter.default is parameter.empty:
            return f"takes {parameter.name}: it is written {_WRITTEN_FOR[parameter.name]}"
    returned = signature.return_annotation
    text = returned if isinstance(returned, str) else getattr(returned, "__name__", str(returned))
    if returned is not signature.empty and _LISTS.match(text):
        return f"returns {text[:40]}: it is written for a batch"
    return None


def _did_you_mean(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def one_line(error: BaseException) -> str:
    """`error` as one line of at most 300 characters: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
