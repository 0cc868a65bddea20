"""One row of a data set, checked as far as it can be without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from rlkd.config.schema import DataConfig, MessageKeys

T = TypeVar("T")

LAST_BY_ASSISTANT = (
    "the last message is the assistant's, so there is nothing to answer; take it out (data.completion_column is for "
    "completions), or let the student continue it by data.continue_final_message: true"
)
LEAVE_OUT = "leave the row out of the data"
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Others must be named in data.messages.roles, since a template may accept any word as a role, even a misspelt one."""
_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example, checked, not yet tokenized."""

    where: str
    """For messages: file and line, or data set and row."""
    id: str
    prompt: str | tuple[Mapping[str, Any], ...]
    """Messages have `role`, `content` (None if there are tool calls) and any other fields of the data."""
    answer: str | None
    privileged: str | None
    completion: str | None
    rejected: str | None
    tools: tuple[Mapping[str, Any], ...] | None
    meta: Mapping[str, Any]
    """All other columns. Rewards get them."""

    def canonical(self) -> bytes:
        """The content of the row, without its place.

        Checkpoints keep a digest of this, so a new field must have a default, and is left out while it has that value.
        """
        values = asdict(self)
        held = {
            field.name: values[field.name]
            for field in fields(self)
            if field.name != "where" and (field.default is MISSING or values[field.name] != field.default)
        }
        return json.dumps(held, sort_keys=True).encode()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of a row. `setting`: the config key that may be wrong instead."""

    line: str
    setting: str = ""


class _Missing(ValueError):
    """There is no such column."""


def read(data: DataConfig, columns: Mapping[str, Any], where: str, number: int, nulls: bool) -> Row | list[Fault]:
    """The row, or all its faults.

    `nulls`: whether nulls were filled in by the table format and should be removed.
    """
    faults: list[Fault] = []

    def get(key: str, check: Callable[[Any, str], T]) -> T | None:
        """The checked value of a column; None if no column is configured, or it is faulty."""
        name = getattr(data, key)
        if name is None:
            return None
        try:
            return check(column(columns, name, f"data.{key}"), f"column {name!r} (data.{key})")
        except _Missing as error:
            faults.append(Fault(line=f"{where}: {error}", setting=key))
        except ValueError as error:
            faults.append(Fault(line=f"{where}: {error}"))
        return None

    prompt = get("prompt_column", lambda value, what: _prompt(data, _cleared(value, nulls), what))
    tools = get("tools_column", lambda value, what: _tools(value, what, nulls))
    texts = {name: get(f"{name}_column", _text) for name in ("answer", "privileged", "completion", "rejected", "id")}
    used = {getattr(data, f"{name}_column") for name in ("prompt", "tools", *texts)}
    meta = {name: value for name, value in columns.items() if name not in used}
    for name, value in meta.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            faults.append(Fault(line=f"{where}: column {name!r} is not JSON ({error}); drop it from the data"))
    if faults:
        return faults
    assert prompt is not None
    named = texts.pop("id")
    return Row(where=where, id=str(number) if named is None else named, prompt=prompt, tools=tools, meta=meta, **texts)


def column(columns: Mapping[str, Any], name: str, key: str) -> Any:
    """The value of the column `name`. If there is no column `a.b.c`, it is the field `c` of `b` of the column `a`.

    Raises: _Missing, which lists the columns that exist.
    """
    tree, above, rest = columns, "", name
    while rest not in tree:
        # A column's name may have dots itself: the longest one that exists is taken.
        parts = rest.split(".")
        heads = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
        head = next((head for head in heads if head in tree), None)
        if head is None:
            has = " ".join(", ".join(tree).split())
            has = f"{has[:_SHOWN]}{'…' if len(has) > _SHOWN else ''}"
            raise _Missing(f"no column {name!r} ({key}); {f'{above!r}' if above else 'it'} has: {has}")
        above = f"{above}.{head}" if above else head
        tree, rest = tree[head], rest[len(head) + 1 :]
        if not isinstance(tree, Mapping):
            raise _Missing(f"no column {name!r} ({key}); {above!r} is {_kind(tree)}, which has no columns")
    return tree[rest]


def _text(value: Any, what: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{what}: expected a text, got {_kind(value)}{_as_text(value)}")
    return value


def _prompt(data: DataConfig, value: Any, what: str) -> str | tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{what}: expected a text, got an empty one; {LEAVE_OUT}")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{what}: expected a text or a list of messages, got {_kind(value)}")
    if not value:
        raise ValueError(f"{what}: expected messages, got an empty list; {LEAVE_OUT}")
    messages = tuple(_message(data.messages, m, f"{what}: message {i}") for i, m in enumerate(value, start=1))
    if not any((message["content"] or "").strip() for message in messages):
        raise ValueError(f"{what}: expected a text in one message, got only empty ones; {LEAVE_OUT}")
    if messages[-1]["role"] == "assistant" and not data.continue_final_message:
        raise ValueError(f"{what}: {LAST_BY_ASSISTANT}")
    return messages


def _message(keys: MessageKeys, message: Any, what: str) -> Mapping[str, Any]:
    """A message with the keys `role` and `content` and all its other fields that are not null."""
    if not isinstance(message, dict):
        raise ValueError(f"{what}: expected an object with a text 'role' and a text 'content', got {_kind(message)}")
    role, content = message.get(keys.role), message.get(keys.content)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and message.get("tool_calls"))):
        has = ", ".join(f"{name}: {str(value)[:20]!r}" for name, value in message.items())
        other = not {keys.role, keys.content} <= message.keys() and not ("tool_calls" in message and "role" in message)
        hint = "; describe the keys of messages by data.messages, e.g. {role: from, content: value}" if other else ""
        raise ValueError(f"{what}: expected a text {keys.role!r} and a text {keys.content!r}, got {has[:_SHOWN]}{hint}")
    mapped = keys.roles.get(role, role)
    if mapped not in KNOWN_ROLES and role not in keys.roles:
        raise ValueError(
            f"{what}: expected a {keys.role} of {', '.join(KNOWN_ROLES[:-2])}, got {role[:40]!r}; name it in "
            f"data.messages.roles, e.g. {{human: user, gpt: assistant}}"
        )
    others = {n: v for n, v in message.items() if n not in (keys.role, keys.content) and v is not None}
    return {**others, "role": mapped, "content": content}


def _tools(value: Any, what: str, nulls: bool) -> tuple[Mapping[str, Any], ...] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"{what}: expected a list of tools, or its JSON, got the text {value[:40]!r} ({error})"
            ) from error
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{what}: expected a list of objects, or null, got {_kind(value)}")
    return tuple(_cleared(value, nulls))


def _cleared(value: Any, nulls: bool) -> Any:
    """`value` without the nulls that a table format fills in for fields that only other rows have."""
    if not nulls:
        return value
    if isinstance(value, dict):
        return {name: _cleared(inner, nulls) for name, inner in value.items() if inner is not None}
    return [_cleared(inner, nulls) for inner in value] if isinstance(value, list) else value


def _as_text(value: Any) -> str:
    return f'; write it in quotes: "{value}"' if isinstance(value, float) else ""


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
