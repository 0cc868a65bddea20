"""Configuration errors, one line each: `FILE:LINE: key: expected X, got Y; fix`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import ErrorDetails

from rlkd.config.help import Path, Schema, Slot, choices, dotted, expected
from rlkd.config.yaml_tree import COMMAND_LINE, Node, at, scalar
from rlkd.plugins import installed

_MAX_SHOWN_CHARS = 60


class ConfigError(ValueError):
    """An invalid configuration; `lines` has one line per mistake.

    Keys in a file may contain any character, so newlines and terminal control characters are escaped.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines]
        super().__init__("\n".join(self.lines))


def shown(node: Node) -> str:
    """A node as it was written, for messages: strings quoted, numbers as typed, long values shortened."""
    if isinstance(node.value, dict):
        return "a section"
    if isinstance(node.value, list):
        text = f"[{', '.join(shown(item) for item in node.value)}]"
    elif isinstance(node.value, str):
        text = repr(node.value)
    else:
        text = node.text or "nothing"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 1]}…"


@dataclass
class Report:
    """Collects the mistakes in one merged tree; only the first per key is kept."""

    root: Node
    schema: Schema
    general: list[str]
    """Lines that are not about a key, such as syntax errors."""
    _lines: dict[Path, str] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """All lines, those about keys in the order of the sections."""
        order = [*self.schema.fields(self.schema.config)]
        ranked = sorted(self._lines, key=lambda path: order.index(path[0]) if path[0] in order else len(order))
        return [*self.general, *(self._lines[path] for path in ranked if self._lines[path])]

    def add(self, path: Path, message: str) -> None:
        """Add a mistake, prefixed with the file and line that set the key (or the section that lacks it)."""
        origin = at(self.root, path)[0].origin or COMMAND_LINE
        self._lines.setdefault(path, f"{origin}: {dotted(path)}: {' '.join(message.split())}")

    def suppress(self, path: Path) -> None:
        """Report nothing for `path`: its error is a consequence of a mistake that is reported elsewhere."""
        self._lines.setdefault(path, "")

    def unknown_kind(self, place: Slot, path: Path) -> None:
        """Report that the section at `path` has no tag, or an unknown one."""
        node, exact = at(self.root, path)
        assert place.tag is not None
        kinds = [*place.variants, *(installed(place.outside) if place.outside is not None else [])]
        if exact and not isinstance(node.value, dict) and node.value is not None:
            hint = f"; did you mean {dotted(path)}.{place.tag}: {node.value}?" if node.value in kinds else ""
            self.add(path, f"expected {expected(place)}, got {shown(node)}{hint}")
            return
        path = (*path, place.tag)
        tag, exact = at(self.root, path)
        own = f" | {place.outside.form} of your own" if place.outside is not None else ""
        names = f"expected {' | '.join(kinds)}{own}"
        self.add(path, f"{names}, got {shown(tag)}{_near(tag.value, kinds)}" if exact else f"missing; {names}")

    def pydantic(self, errors: Sequence[ErrorDetails], above: Path, place: Slot) -> None:
        """Add a line for each pydantic error about the value at `above`, whose slot is `place`."""
        for error in errors:
            path, slot, owner = self._locate(error["loc"], above, place)
            kind = error["type"]
            if kind == "extra_forbidden":
                self.add(path, self._unknown_key(path, owner))
            elif kind.startswith("union_tag_") or (slot.tag is not None and not slot.is_schedule):
                self.unknown_kind(slot, path)
            elif kind == "missing":
                self.add(path, f"missing; expected {expected(slot)}")
            elif kind in ("value_error", "assertion_error"):
                self.refused(path, str(error["ctx"]["error"]))
            else:
                what = "a finite number" if kind == "finite_number" else expected(slot)
                self.add(path, self._wrong(path, slot, error["input"], what))

    def refused(self, path: Path, why: str) -> None:
        """Add the message of one of our validators, with the value it rejected."""
        node, exact = at(self.root, path)
        what, semicolon, fix = why.partition("; ")
        if not exact or isinstance(node.value, dict | list):
            self.add(path, why)
        elif what.startswith("expected "):
            self.add(path, f"{what}, got {shown(node)}{semicolon}{fix}")
        else:
            self.add(path, f"got {shown(node)}; {why}")

    def _wrong(self, path: Path, slot: Slot, value: Any, what: str) -> str:
        node, exact = at(self.root, path)
        if not exact:  # the value came from a reference
            return f"expected {what}, got {type(value).__name__} from {shown(node)}"
        line = f"expected {what}, got {shown(node)}"
        if not isinstance(node.value, str):
            return line
        section = _section_of(slot, node.value)
        if section is not None:
            return f"{line}; write {section}"
        numeric = {int, float} & set(slot.members) or slot.is_schedule
        if numeric and "${" in node.value:
            return f"{line}; a reference gives a string: write ${{oc.decode:{node.value}}} to parse it as a number"
        if numeric and not isinstance(scalar(node.value), str):
            return f"{line}; drop the quotes"
        return line + _near(node.value, choices(slot))

    def _locate(self, loc: tuple[int | str, ...], path: Path, place: Slot) -> tuple[Path, Slot, Slot]:
        """The path and slot that pydantic's `loc` refers to, and the slot of the enclosing section.

        `loc` also contains the tags of tagged sections, which are not part of the path.
        """
        owner = place
        for part in loc:
            if place.is_schedule and not isinstance(at(self.root, path)[0].value, dict):
                break  # a plain number is the value of a constant schedule
            elif place.tag is not None:
                place = Slot((place.variants[str(part)],))
            elif isinstance(part, int) and place.item is not None:
                path, owner, place = (*path, part), place, place.item
            elif place.models and not place.is_free:
                slots = self.schema.fields(place.models[0])
                path, owner = (*path, part), place
                if part not in slots:
                    break
                place = slots[str(part)]
        return path, place, owner

    def _unknown_key(self, path: Path, owner: Slot) -> str:
        key, section = str(path[-1]), dotted(path[:-1])
        known = list(self.schema.fields(owner.models[0]))
        for kinds in self._kinds_around(path[:-1]):
            having = [tag for tag, model in kinds.variants.items() if key in self.schema.fields(model)]
            if having:
                return f"unknown key here; only {section}.{kinds.tag}: {' | '.join(having)} has it"
        if key.partition(".")[0] in known:
            return f"unknown key; in YAML the sections are nested: {key.replace('.', ': {', 1)}: …}}"
        lists_apart = [(where, name) for where, name in self.schema.all_keys() if "[]" not in where]
        elsewhere = sorted({f"{where}.{name}" for where, name in lists_apart if name == key})
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        rough = difflib.get_close_matches(key, known, n=1)
        if close or (rough and not elsewhere):
            return f"unknown key; did you mean {dotted((*path[:-1], (close or rough)[0]))}?"
        if 0 < len(elsewhere) <= 3:
            return f"unknown key; did you mean {' or '.join(elsewhere)}?"
        return f"unknown key; {section or 'a config'} has {', '.join(known)}"

    def _kinds_around(self, section: Path) -> list[Slot]:
        place = self.schema.root
        for part in section:
            if place.tag is not None or not place.models or part not in self.schema.fields(place.models[0]):
                return []
            place = self.schema.fields(place.models[0])[str(part)]
        return [place] if place.tag is not None else []


def _section_of(slot: Slot, word: str) -> str | None:
    """`{name: word}` for a slot of a section whose only required key is `name`, or a list with it; otherwise None."""
    if slot.item is not None:
        section = _section_of(slot.item, word)
        return None if section is None else f"[{section}]"
    required = [name for model in slot.models for name, f in model.model_fields.items() if f.is_required()]
    return f"{{{required[0]}: {word}}}" if len(required) == 1 and not slot.is_schedule else None


def _near(value: Any, known: Sequence[str]) -> str:
    word = str(value)
    near = difflib.get_close_matches(word, known, n=1) or [name for name in known if word and name.startswith(word)]
    return f"; did you mean {near[0]}?" if near else ""
