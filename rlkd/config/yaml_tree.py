"""YAML files and `a.b=c` overrides → one tree of nodes that record where each value was set.

A scalar keeps its source text, so that `run.name: 1.10` is the name "1.10" and error messages quote what was typed.
Unquoted words follow YAML 1.2: only true and false are booleans, so `log.wandb: off` is the string "off"; 010 and
12:30 are not numbers. 1e-6 is a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlkd.storage.near import did_you_mean

COMMAND_LINE = "command line"
MISSING = "???"
MAX_DEPTH = 50
"""Nesting of sections and lists; a valid config has at most five levels."""
MAX_VALUES = 100_000
"""Limit per file with aliases (*) expanded: a few lines of nested aliases can expand to more than fits in memory."""
_MAX_INT_CHARS = 300
"""In digits. Python refuses to parse more than 4300."""

_DIGITS = "[0-9]+(?:_[0-9]+)*"
_INT = re.compile(rf"[-+]?(0|(?![0_]){_DIGITS})")
_FLOAT = re.compile(rf"[-+]?({_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS}|{_DIGITS}(?=[eE]))([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TOO_DEEP = f"sections and lists nested more than {MAX_DEPTH} deep"
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    spelling: word == "true" for word in ("true", "false") for spelling in (word, word.capitalize(), word.upper())
}


@dataclass(frozen=True)
class Node:
    """A node of the tree: a scalar, a dict of nodes or a list of nodes."""

    value: Any
    origin: str
    """`file:line` or `command line`."""
    text: str = ""
    """For a scalar: its source text, without quotes."""
    plain: bool = False
    """Whether it was written without quotes."""


def scalar(text: str) -> Any:
    """The value of an unquoted word: null, a boolean, a number, or the string itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) <= _MAX_INT_CHARS:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _INFINITY.fullmatch(text) else text


def read_file(path: str, problems: list[str]) -> Node | None:
    """The tree of one file, or None if it cannot be parsed; errors are added to `problems`."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}{did_you_mean(path)}")
        return None
    try:
        root = yaml.compose(content, Loader=yaml.BaseLoader)
        if root is None:
            return Node({}, path)
        if not isinstance(root, yaml.MappingNode):
            problems.append(f"{path}:{_line(root)}: expected sections such as model: and data:, got {_kind(root)}")
            return None
        _check_size(root)
        return replace(_node(root, f"{path}:{_line(root)}", path, problems), origin=path)
    except yaml.YAMLError as error:
        problems.append(f"{path}{_yaml_error(error)}")
        return None
    except RecursionError:
        problems.append(f"{path}: broken YAML: {_TOO_DEEP}")
        return None


def unspaced(arguments: Sequence[str], problems: list[str]) -> list[str]:
    """The arguments without those of a `key = value` with spaces, each of which is added to `problems`."""
    kept, rest = [], list(arguments)
    while rest:
        parts = [rest.pop(0)]
        if rest and "=" not in parts[0] and rest[0].startswith("="):
            parts.append(rest.pop(0))
        if rest and parts[-1].endswith("=") and "=" not in rest[0]:
            parts.append(rest.pop(0))
        if len(parts) == 1:
            kept += parts
        else:
            problems.append(f"{COMMAND_LINE}: expected {''.join(parts)}, got {' '.join(parts)!r}; leave out the spaces")
    return kept


def read_override(argument: str, problems: list[str]) -> Node | None:
    """The tree of one `a.b=value`; the value is parsed as YAML only if it starts with a quote or a bracket."""
    key, equals, text = argument.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        hint = f"; for a file write --config {argument}" if argument.endswith((".yaml", ".yml")) else ""
        problems.append(f"{COMMAND_LINE}: expected section.key=value, got {argument!r}{hint}")
        return None
    wrong = _invalid_text(argument)
    if wrong is not None or len(parts) > MAX_DEPTH:
        problems.append(f"{COMMAND_LINE}: {argument[:60]!r}: {wrong or _TOO_DEEP}")
        return None
    node = Node(scalar(text.strip()), COMMAND_LINE, text.strip(), plain=True)
    if text.lstrip()[:1] in tuple("[{\"'"):
        try:
            composed = yaml.compose(text, Loader=yaml.BaseLoader)
            assert composed is not None
            _check_size(composed)
            node = _node(composed, COMMAND_LINE, None, problems, section=key)
        except yaml.YAMLError as error:
            what = _yaml_error(error).split(": ", 1)[-1]
            problems.append(
                f"{COMMAND_LINE}: {key}: expected valid YAML, got {text!r} ({what}); quote the value if it is text"
            )
            return None
        except RecursionError:
            problems.append(f"{COMMAND_LINE}: {key}: {_TOO_DEEP}")
            return None
    for part in reversed(parts):
        node = Node({part: node}, COMMAND_LINE)
    return node


def merge(under: Node, over: Node, tags: Mapping[tuple[str, ...], str], path: tuple[str, ...] = ()) -> Node:
    """Merge `over` into `under`: mappings are merged, anything else is replaced.

    `tags` maps a section's path to its discriminator key: a mapping of another kind replaces the whole section. At
    all other paths that key is `kind`, as in schedules. A blank section and `???` change nothing.
    """
    if over.value == MISSING or (over.value is None and not over.text and isinstance(under.value, dict)):
        return under
    if not isinstance(under.value, dict) or not isinstance(over.value, dict):
        return over
    tag = tags.get(path, "kind")
    if tag in under.value and tag in over.value and under.value[tag].value != over.value[tag].value:
        return over
    merged = dict(under.value)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node, tags, (*path, key)) if key in merged else node
    return Node(merged, under.origin)


def at(root: Node, path: Sequence[str | int]) -> tuple[Node, bool]:
    """(the node at `path`, True), or (the nearest node above it, False) if there is none."""
    node = root
    for key in path:
        inside = isinstance(node.value, dict) and key in node.value
        if not inside and not (isinstance(node.value, list) and isinstance(key, int) and key < len(node.value)):
            return node, False
        node = node.value[key]
    return node, True


def _node(
    composed: yaml.Node,
    origin: str,
    file: str | None,
    problems: list[str],
    above: tuple[yaml.Node, ...] = (),
    section: str = "",
) -> Node:
    """Convert a composed YAML node; `above` are the nodes that contain it, `section` is its dotted key."""

    def place(part: yaml.Node) -> str:
        return f"{file}:{_line(part)}" if file is not None else origin

    if composed in above:
        raise yaml.MarkedYAMLError(problem="an anchor (&) that contains itself", problem_mark=composed.start_mark)
    if len(above) > MAX_DEPTH:
        raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=composed.start_mark)
    if not composed.tag.startswith("tag:yaml.org,2002:") or composed.tag.split(":")[-1] not in ("str", "map", "seq"):
        problems.append(f"{place(composed)}: expected a plain value, got the tag {composed.tag}; remove the tag")
    if isinstance(composed, yaml.ScalarNode):
        plain = composed.style is None
        wrong = _invalid_text(composed.value)
        if wrong is not None:
            problems.append(f"{place(composed)}: {wrong}")
            return Node("", origin)
        return Node(scalar(composed.value) if plain else composed.value, origin, composed.value, plain)
    above = (*above, composed)
    if isinstance(composed, yaml.SequenceNode):
        inside = [_node(item, place(item), file, problems, above, section) for item in composed.value]
        return Node(inside, origin)
    items: dict[str, Node] = {}
    lines: dict[str, int] = {}
    inherited: dict[str, Node] = {}
    for key, value in composed.value:
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{place(key)}: expected a plain word as a key, got {_kind(key)}")
        elif key.value == "<<" and key.style is None:
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                node = _node(source, place(key), file, problems, above, section)
                if isinstance(node.value, dict):
                    inherited = node.value | inherited
                else:
                    problems.append(f"{place(key)}: <<: expected a mapping, got {_kind(source)}")
        else:
            dotted = f"{section}.{key.value}" if section else key.value
            node = _node(value, place(key), file, problems, above, dotted)
            if key.value in items:
                problems.append(f"{place(key)}: {dotted}: set twice, first on line {lines[key.value]}; keep one")
                node = merge(
                    node, items[key.value], {}
                )  # the first value wins, so that this mistake causes no further errors
            lines.setdefault(key.value, _line(key))
            items[key.value] = node
    return Node(inherited | items, origin)


def _check_size(root: yaml.Node) -> None:
    """Raises: yaml.MarkedYAMLError if the file has too many values once its aliases are expanded."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0  # while it is being counted; `_node` reports an anchor that contains itself
            inside = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(size, inside)))
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        problem = f"more than {MAX_VALUES} values once aliases (*) are expanded"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=root.start_mark)


def _invalid_text(text: str) -> str | None:
    """Why `text` cannot be written to a file or used as a file name; None if it can."""
    if "\0" in text:
        return "expected text without NUL characters, got one; remove it"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "expected UTF-8 text, got half of a surrogate pair or other bytes; write the character itself, in UTF-8"
    return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"the text {node.value[:40]!r}"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _yaml_error(error: yaml.YAMLError) -> str:
    """A YAML error as `:line: broken YAML: reason`."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        what = error.problem or error.context or "broken YAML"
        if "'\\t'" in what:
            what = "found a tab; indent YAML with spaces"
        elif "alias" in what or "document" in what:
            what = f"{error.context or ''} {what}".strip()
        return f":{error.problem_mark.line + 1}: broken YAML: {' '.join(what.split())}"
    return f": broken YAML: {' '.join(str(error).split())}"
