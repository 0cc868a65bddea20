"""The schema of the configuration classes (the keys and the types they accept) and the text of `--help`."""

from __future__ import annotations

import difflib
import itertools
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlkd.config.schedules import Constant, Schedule
from rlkd.config.schema import AlgorithmConfig, Config, Teacher, TeacherConfig
from rlkd.plugins import ALGORITHM, TEACHER, Kind

Algorithms = Mapping[str, type[AlgorithmConfig]]
"""algorithm.name → class of the `algorithm` section."""
LearnOptions = Callable[[str], type[AlgorithmConfig] | None]
"""algorithm.name → class of its section; None if it is not from outside the package. Raises: ValueError, one line."""
_ENTRY = re.compile(r"  \w+(?:\.\w+|\[\])+:")
"""The first line of a key's help."""
Path = tuple[str | int, ...]
"""The path of a key: section, key, list index …"""


@dataclass(frozen=True)
class Slot:
    """A place in the tree and the types of value it accepts."""

    members: tuple[Any, ...]
    """The accepted types except None: a class, a Literal, list[…] or dict[…]."""
    nullable: bool = False
    tag: str | None = None
    """The discriminator key, if the members are several kinds of section."""
    metadata: tuple[Any, ...] = ()
    """Bounds on the value."""
    outside: Kind | None = None
    """What else the tag may name: a class from outside the package."""

    @property
    def models(self) -> tuple[type[BaseModel], ...]:
        """The members that are sections."""
        return tuple(m for m in self.members if isinstance(m, type) and issubclass(m, BaseModel))

    @property
    def variants(self) -> dict[str, type[BaseModel]]:
        """Tag value → class; empty if there is no tag."""
        if self.tag is None:
            return {}
        return {str(get_args(m.model_fields[self.tag].annotation)[0]): m for m in self.models}

    @property
    def is_free(self) -> bool:
        """Whether it accepts any value, e.g. the options of a reward function."""
        return any(m is Any or m is dict or get_origin(m) is dict for m in self.members)

    @property
    def is_schedule(self) -> bool:
        """Whether it accepts a schedule."""
        return Constant in self.members

    @property
    def item(self) -> Slot | None:
        """The slot of the list's items; None if it is not a list."""
        lists = [m for m in self.members if get_origin(m) is list]
        return slot(get_args(lists[0])[0]) if lists else None


def slot(annotation: Any, metadata: tuple[Any, ...] = (), tag: str | None = None) -> Slot:
    """The slot of a type annotation."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        for part in extra:
            if isinstance(part, FieldInfo):
                tag = tag or _tag(part)
                metadata = (*metadata, *part.metadata)
            else:
                metadata = (*metadata, part)
        return slot(inner, metadata, tag)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [slot(member, metadata, tag) for member in get_args(annotation) if member is not type(None)]
        nullable = type(None) in get_args(annotation) or any(p.nullable for p in parts)
        tags = [p.tag for p in parts if p.tag is not None]
        return Slot(tuple(m for p in parts for m in p.members), nullable, tags[0] if tags else None, parts[0].metadata)
    return Slot((annotation,), False, tag, metadata)


def fields(model: type[BaseModel]) -> dict[str, Slot]:
    """Key → slot, for each field of a section's class."""
    return {name: slot(f.annotation, tuple(f.metadata), _tag(f)) for name, f in model.model_fields.items()}


def default(field: FieldInfo) -> Any:
    """A field's default as plain YAML data; PydanticUndefined if the key is required."""
    value = field.get_default(call_default_factory=True, validated_data={})
    return value if value is PydanticUndefined else plain(value)


def plain(value: Any) -> Any:
    """`value` as plain YAML data: sections become dicts, constant schedules become numbers."""
    if isinstance(value, Constant):
        return value.value
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def expected(place: Slot) -> str:
    """The values that a slot accepts, in words: `an integer >= 1`, `hf | vllm`, `a list of text, or null`."""
    if place.is_schedule:
        bound = _limits(tuple(Constant.model_fields["value"].metadata))
        words = [f"a number{bound}, or a schedule with kind: {' | '.join(place.variants)}"]
    elif place.tag is not None:
        words = [f"a section with {place.tag}: {' | '.join(place.variants)}"]
    else:
        words = [_expected_one(member) + _limits(place.metadata) for member in place.members]
    return ", or ".join([*words, *(["null"] if place.nullable else [])])


class Schema:
    """The configuration tree for a given set of algorithms."""

    def __init__(
        self,
        algorithms: Algorithms,
        own_teachers: Mapping[str, type[TeacherConfig]] = MappingProxyType({}),
        others: bool = False,
    ) -> None:
        """
        Args:
            own_teachers: teacher.backend → class of the `teacher` section, for teachers from outside the package.
            others: whether algorithm.name and teacher.backend also accept module:Class.
        """
        self.config = Config
        self.own_teachers = own_teachers
        self.root = Slot((Config,))
        self.algorithm = Slot(tuple(algorithms.values()), tag="name", outside=ALGORITHM if others else None)
        built_in = [model for model in slot(Teacher).models if model is not TeacherConfig]
        self.teacher = Slot((*built_in, *own_teachers.values()), tag="backend", outside=TEACHER if others else None)
        assert list(self.algorithm.variants) == list(algorithms), "the names of ALGORITHMS and of their Config differ"

    def fields(self, model: type[BaseModel]) -> dict[str, Slot]:
        """Key → slot of a section's class; for Config, with the known algorithms and teachers."""
        return fields(model) | ({"algorithm": self.algorithm, "teacher": self.teacher} if model is Config else {})

    def all_keys(self) -> Iterator[tuple[str, str]]:
        """Every (dotted section, key) of the tree, for all kinds of each section."""
        for name, place in self.fields(Config).items():
            for model in place.models:
                yield from ((section, key) for section, key, _ in _keys(name, model))

    def sections(self) -> list[tuple[str, str]]:
        """(name, description) of every section; of one with several kinds, their names."""
        return [
            (name, f"one of {', '.join(place.variants)}" if place.tag else _about(place.models[0]).split(". ")[0])
            for name, place in self.fields(Config).items()
        ]

    def help_text(self, names: Sequence[str]) -> str:
        """Every dotted key of the named sections with its type, default and description, wrapped at 100 columns.

        Args:
            names: sections, kinds of a section such as kdrl, dotted keys, or `all`.

        Raises: ValueError, one line, for an unknown name.
        """
        blocks = list(self._blocks())
        keys = [entry for _, lines in blocks for entry in _entries(lines)]
        texts: list[str] = []
        for name in names:
            found = ["\n".join([*lines, ""]) for known, lines in blocks if name == "all" or name in known]
            found = found or ["\n".join(lines) for key, lines in keys if _is_under(key, name)]
            if not found:
                sections = [section for section, _ in self.sections()]
                near = difflib.get_close_matches(name, [*sections, *(key for key, _ in keys)], n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sections)}"
                raise ValueError(f"--help {name}: unknown section or key; {hint}")
            texts += found
        return "\n".join(dict.fromkeys(texts)).rstrip("\n") + "\n"

    def completions(self, incomplete: str) -> list[str]:
        """What `key=value` may become: `key=`, or with one of the words that the key accepts."""
        places: dict[str, list[Slot]] = {}
        for name, section in self.fields(Config).items():
            for model in section.models:
                for path, key, place in _keys(name, model):
                    places.setdefault(f"{path}.{key}", []).append(place)
        key, equals, value = incomplete.partition("=")
        if not equals:
            return [f"{name}=" for name in places if name.startswith(key) and "[]" not in name]
        words = dict.fromkeys(word for place in places.get(key, ()) for word in _words(place))
        return [f"{key}={word}" for word in words if word.startswith(value)]

    def _blocks(self) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """(names, lines) of each kind of section."""
        for name, place in self.fields(Config).items():
            if place.tag is None:
                yield (name,), _section_help(name, name, place.models[0])
                continue
            if place.outside is not None:
                about = f"{name}.{place.tag}: {place.outside.form} - one of your own, with the keys of its Options"
                yield (name,), _wrapped(about, 0)
            for tag, model in place.variants.items():
                yield (name, tag), _section_help(f"{name}.{place.tag}: {tag}", name, model)
        lines = ["schedules: a number (constant) or a mapping with kind; iterations are counted from 0"]
        for tag, model in slot(Schedule).variants.items():
            about = " ".join((model.__doc__ or "").split("\n")[0].split())
            keys = ", ".join(f"{key}: {expected(s)}" for key, s in fields(model).items() if key != "kind")
            lines += [f"  kind: {tag}", *_wrapped(f"{about} {keys}", 6)]
        yield ("schedules",), lines


def _entries(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(dotted key, lines) of each key of a section's help."""
    starts = [i for i, line in enumerate(lines) if _ENTRY.match(line)]
    for start, end in itertools.pairwise([*starts, len(lines)]):
        yield lines[start].strip().split(":")[0], list(lines[start:end])


def _is_under(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))


def _words(place: Slot) -> list[str]:
    """The words that complete a value: of a choice, a switch, or the kind of a section."""
    return choices(place) + (["true", "false"] if bool in place.members else [])


def _about(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def choices(place: Slot) -> list[str]:
    """The literal words that a slot accepts."""
    return [str(choice) for m in place.members if get_origin(m) is Literal for choice in get_args(m)]


def dotted(path: Path) -> str:
    """A path as text, e.g. `reward.functions[0].name`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _keys(section: str, model: type[BaseModel]) -> Iterator[tuple[str, str, Slot]]:
    for name, place in fields(model).items():
        yield section, name, place
        item = place.item
        if not place.is_schedule:
            for inner in place.models:
                yield from _keys(f"{section}.{name}", inner)
        for inner in item.models if item is not None else ():
            yield from _keys(f"{section}.{name}[]", inner)


def _section_help(title: str, path: str, model: type[BaseModel]) -> list[str]:
    about = _about(model)
    return [*_wrapped(f"{title}{f' - {about}' if about else ''}", 0), *_keys_help(path, model)]


def _keys_help(path: str, model: type[BaseModel], defaults: Mapping[str, Any] | None = None) -> list[str]:
    lines: list[str] = []
    for name, place in fields(model).items():
        field = model.model_fields[name]
        key = f"{path}.{name}"
        models = place.item.models if place.item is not None else ()
        if place.models and not place.is_schedule:
            variants = place.variants or {"": place.models[0]}
            for tag, inner in variants.items():
                lines += _wrapped(f"{key}{f'.{place.tag}: {tag}' if tag else ''}: {field.description or ''}", 2)
                whole = default(field) if defaults is None else defaults[name]
                lines += _keys_help(key, inner, whole if not tag and isinstance(whole, dict) else None)
            continue
        value = default(field) if defaults is None else defaults[name]
        shown = "required" if value is PydanticUndefined else f"default {_flow(value)}"
        lines += _wrapped(f"{key}: {expected(place)}; {shown}", 2)
        if field.description:
            lines += _wrapped(field.description, 6)
        for inner in models:
            lines += _keys_help(f"{key}[]", inner)
    return lines


def _flow(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("...\n").strip()


def _wrapped(text: str, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(
        text, 100, initial_indent=margin, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
    )


def _tag(field: FieldInfo) -> str | None:
    return field.discriminator if isinstance(field.discriminator, str) else None


def _expected_one(member: Any) -> str:
    if get_origin(member) is Literal:
        return " | ".join(str(choice) for choice in get_args(member))
    if get_origin(member) is list:
        one = expected(slot(get_args(member)[0]))
        plurals = {"an integer": "integers", "a number": "numbers", "text": "texts", "a list of": "lists of"}
        for singular, plural in plurals.items():
            one = one.replace(singular, plural, 1) if one.startswith(singular) else one
        return f"a list of {one}"
    if get_origin(member) is dict or member is dict:
        return "a mapping"
    if isinstance(member, type) and issubclass(member, BaseModel):
        required = [name for name, f in member.model_fields.items() if f.is_required()]
        return f"a section with {', '.join(required)}" if required else "a section"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text", Any: "anything"}[member]


def _limits(metadata: tuple[Any, ...]) -> str:
    least = [part.min_length for part in metadata if isinstance(part, bounds.MinLen)]
    most = [part.max_length for part in metadata if isinstance(part, bounds.MaxLen)]
    if least or most:
        words = [f"at least {n}" for n in least] + [f"at most {n}" for n in most]
        return f" (exactly {least[0]})" if least == most else f" ({', '.join(words)})"
    found = []
    for part in metadata:
        match part:
            case bounds.Ge(ge=limit):
                found.append(f">= {limit}")
            case bounds.Gt(gt=limit):
                found.append(f"> {limit}")
            case bounds.Le(le=limit):
                found.append(f"<= {limit}")
            case bounds.Lt(lt=limit):
                found.append(f"< {limit}")
            case object(pattern=str(pattern)):
                found.append(f"of the form {pattern}")
    return f" {' and '.join(found)}" if found else ""
