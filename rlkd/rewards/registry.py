"""The function for each name in `reward.functions`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkd.plugins import REWARD, did_you_mean, find, installed, is_outside, one_line

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


def resolve(name: str) -> Callable[..., Any]:
    """The reward function called `name`: a builtin, `module:function`, or one that an installed package declares.

    Raises: ValueError, one line.
    """
    if name.startswith("__main__:"):
        raise ValueError(f"reward {name!r}: workers are processes of their own; move the function into a module")
    if name not in BUILTIN and not is_outside(name, REWARD):
        known = [*BUILTIN, *installed(REWARD)]
        raise ValueError(
            f"reward {name!r} is unknown{did_you_mean(name, known)}; use one of {', '.join(known)}, or your own as "
            "module:function"
        )
    try:
        found: Callable[..., Any] = find(BUILTIN.get(name, name), REWARD, lambda function: function)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    return found


def check(functions: Sequence[RewardFunction]) -> list[str]:
    """The problems with the rewards of a configuration, one line each; empty if all can be called.

    Imports the user's modules into this process, so that errors appear before any model is loaded.
    """
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
            problems.append(f"reward {name!r} has no option {option!r}{did_you_mean(option, keywords)}")
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
