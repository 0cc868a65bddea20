"""Loading a configuration: files and overrides → a validated Config, or one line per mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from rlkd.config.errors import ConfigError, Report, shown
from rlkd.config.help import Algorithms, LearnOptions, Path, Schema, Slot, default, dotted
from rlkd.config.schema import AlgorithmConfig, Config, Section
from rlkd.config.sections.teacher import teacher_options
from rlkd.config.yaml_tree import COMMAND_LINE, MISSING, Node, at, merge, read_file, read_override, unspaced

__all__ = ["ConfigError", "Loaded", "load"]

_TAGS: Mapping[tuple[str, ...], str] = {("algorithm",): "name", ("teacher",): "backend"}
_SWITCHES = {"on": True, "yes": True, "off": False, "no": False}
_MAX_REFERENCE_DEPTH = 20
"""Limit on nesting while resolving references: one to a section that contains it would recurse forever."""
_LITERAL_HINT = "write \\${ for a literal ${"


@dataclass(frozen=True)
class Loaded:
    """A validated configuration and its YAML text."""

    config: Config
    text: str
    """YAML with every default filled in and references left unresolved; loading it gives the same `config`."""


def load(
    files: Sequence[str], overrides: Sequence[str], algorithms: Algorithms, learn: LearnOptions | None = None
) -> Loaded:
    """Load YAML `files` and `a.b=c` `overrides`; later files override earlier ones, and overrides come last.

    Args:
        algorithms: name → class of the `algorithm` section.
        learn: returns that class for a name from outside the package; None: such names are rejected.

    Raises: ConfigError with one line per mistake.
    """
    under, over, problems = read(files, overrides)
    return checked(on_top(under, over), problems, algorithms, learn)


def read(files: Sequence[str], overrides: Sequence[str]) -> tuple[Node, Node, list[str]]:
    """(the files merged, the overrides merged, mistakes that are not about a key); nothing is validated yet.

    Raises: ConfigError if a file cannot be read.
    """
    problems: list[str] = []
    roots = [root for root in (read_file(path, problems) for path in files) if root is not None]
    arguments = unspaced(overrides, problems)
    nodes = [node for node in (read_override(item, problems) for item in arguments) if node is not None]
    if len(roots) < len(files):
        raise ConfigError(problems)  # keys missing elsewhere may be in the unreadable file
    override = Node({}, COMMAND_LINE)
    for node in nodes:
        override = merge(override, node, {})  # merged first, so that the order of algorithm.name and its keys is free
    root = Node({}, ", ".join(files))
    for node in roots:
        root = merge(root, node, _TAGS)
    return root, override, problems


def on_top(under: Node, over: Node) -> Node:
    """Merge `over` into `under`; a different algorithm or teacher backend replaces the whole section."""
    return merge(under, over, _TAGS)


def set_by(under: Node, over: Node, path: Path) -> str:
    """The file that sets the key at `path` or the nearest section above it; COMMAND_LINE if no file does."""
    return at(on_top(under, over), path)[0].origin.rpartition(":")[0] or COMMAND_LINE


def checked(root: Node, problems: Sequence[str], algorithms: Algorithms, learn: LearnOptions | None = None) -> Loaded:
    """Validate a merged tree. Raises: ConfigError with one line per mistake, `problems` first."""
    kinds: dict[str, dict[str, Any]] = {"algorithm": dict(algorithms), "teacher": {}}
    wrong: dict[Path, str] = {}
    learners = {} if learn is None else {"algorithm": learn, "teacher": teacher_options}
    for section, options_of in learners.items():
        path = (section, _TAGS[section,])
        name = _selected(root, path)
        try:
            options = None if name is None else options_of(name)
        except ValueError as error:
            wrong[path] = str(error)
            continue
        if options is not None:
            kinds[section][str(name)] = options
    schema = Schema(kinds["algorithm"], kinds["teacher"], others=learn is not None)
    report = Report(root, schema, list(problems))
    for key, why in wrong.items():
        report.refused(key, why)
    return _Loading(root, schema, report).run()


def _selected(root: Node, path: Path) -> str | None:
    """The name at `path`; None if it is missing, not a text, or cannot be resolved."""
    node, exact = at(root, path)
    name = node.value if exact else None
    if isinstance(name, str) and "${" in name:
        try:
            name = OmegaConf.select(OmegaConf.create(_plain(root)), dotted(path))
        except OmegaConfBaseException:
            return None  # reported where references are resolved
    return name if isinstance(name, str) else None


@dataclass
class _Loading:
    """Turns one merged tree into a Config; `report` collects the mistakes."""

    root: Node
    schema: Schema
    report: Report

    def run(self) -> Loaded:
        root = self._parsable(self.root, ())
        self.references = OmegaConf.create(_plain(root))
        tree = OmegaConf.create(self._with_defaults(self.schema.root, root, ()))
        resolved = _as_nodes(self._resolved(tree, ()))
        values = self._with_defaults(self.schema.root, resolved, ())  # again: references are resolved now
        config = self._checked(values)
        if config is not None and not self.report.lines:
            _keep_set(config, root)
            for key, message in config.problems():
                self.report.add(tuple(key.split(".")), message)
        if config is None or self.report.lines:
            raise ConfigError(self.report.lines)
        return Loaded(config, OmegaConf.to_yaml(tree))

    def _parsable(self, node: Node, path: Path) -> Node:
        """The tree without strings that OmegaConf cannot parse, which are reported."""
        if isinstance(node.value, dict):
            return replace(node, value={key: self._parsable(inner, (*path, key)) for key, inner in node.value.items()})
        if isinstance(node.value, list):
            return replace(node, value=[self._parsable(inner, (*path, i)) for i, inner in enumerate(node.value)])
        if isinstance(node.value, str) and "${" in node.value:
            try:
                OmegaConf.create({"text": node.value})
            except OmegaConfBaseException:
                self.report.add(
                    path, f"expected a reference such as ${{oc.env:NAME}} after ${{, got {shown(node)}; {_LITERAL_HINT}"
                )
                return replace(node, value="")
        return node

    def _with_defaults(
        self, place: Slot | None, node: Node, path: Path, defaults: Mapping[str, Any] | None = None
    ) -> Any:
        """The plain value of `node` with defaults filled in; on/off and numbers are converted to the type of `place`.

        `defaults`: the section's default values here, if they differ from those of its class.
        """
        if node.value == MISSING:
            self.report.add(path, "is ???, a placeholder; set a value")
            return MISSING
        if place is None:
            return self._untyped(node, path, known=False)
        if isinstance(node.value, list):
            item = place.item
            return [self._with_defaults(item, inner, (*path, i)) for i, inner in enumerate(node.value)]
        if node.value is None and place.models and not place.nullable and not place.is_schedule:
            node = Node({}, node.origin) if path != ("teacher",) else Node({"backend": Node("none", "")}, node.origin)
        if isinstance(node.value, dict):
            model = self._model(place, node, path)
            return (
                self._untyped(node, path, known=place.is_free)
                if model is None
                else self._section(model, node, path, defaults)
            )
        if place.is_free:
            return self._untyped(node, path, known=True)
        if isinstance(node.value, str) and bool in place.members and str not in place.members:
            return _SWITCHES.get(node.value.lower(), node.value)
        is_number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
        if is_number and str in place.members and not {int, float} & set(place.members):
            return node.text or str(node.value)
        return node.value

    def _section(
        self, model: type[BaseModel], node: Node, path: Path, defaults: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        filled: dict[str, Any] = {}
        slots = self.schema.fields(model)
        for name, place in slots.items():
            value = defaults[name] if defaults is not None else default(model.model_fields[name])
            if name in node.value:
                inner = value if place.tag is None and place.models and isinstance(value, dict) else None
                filled[name] = self._with_defaults(place, node.value[name], (*path, name), inner)
                continue
            if value is not PydanticUndefined:
                filled[name] = value
            elif place.models and place.tag is None:
                filled[name] = self._section(place.models[0], Node({}, node.origin), (*path, name))
        for name in node.value.keys() - slots.keys():
            filled[name] = self._with_defaults(None, node.value[name], (*path, name))
        return filled

    def _model(self, place: Slot, node: Node, path: Path) -> type[BaseModel] | None:
        """The section class of the mapping `node`; None if it is not a section or its kind is unknown."""
        if place.tag is None:
            return place.models[0] if place.models else None
        if place.tag not in node.value:
            return None
        kind = node.value[place.tag].value
        if isinstance(kind, str) and "${" in kind:
            try:
                kind = OmegaConf.select(self.references, ".".join(map(str, (*path, place.tag))))
            except OmegaConfBaseException:
                return None  # reported where references are resolved
        return place.variants.get(kind) if isinstance(kind, str) else None

    def _untyped(self, node: Node, path: Path, known: bool) -> Any:
        """A value without a declared type. A bare `off` is rejected there: it could be a string or a boolean."""
        if isinstance(node.value, dict):
            return {key: self._untyped(inner, (*path, key), known) for key, inner in node.value.items()}
        if isinstance(node.value, list):
            return [self._untyped(inner, (*path, i), known) for i, inner in enumerate(node.value)]
        if known and node.plain and isinstance(node.value, str) and node.value.lower() in _SWITCHES:
            self.report.add(path, f"expected true or false, or a quoted string, got {node.text}")
        return node.value

    def _resolved(self, container: DictConfig | ListConfig, path: Path) -> Any:
        """The container's plain values, with references resolved."""
        unresolved: Any = OmegaConf.to_container(container, resolve=False)
        items = unresolved.items() if isinstance(unresolved, dict) else enumerate(unresolved)
        values: dict[Any, Any] = {}
        for key, raw in items:
            here = (*path, key)
            try:
                value = raw if OmegaConf.is_missing(container, key) else container[key]
            except InterpolationToMissingValueError:
                self.report.suppress(here)  # the ??? it refers to is reported
                value = raw
            except OmegaConfBaseException as error:
                self.report.add(here, f"expected a reference that resolves, got {raw!r}: {_why_unresolved(error)}")
                value = raw
            if isinstance(value, DictConfig | ListConfig):
                if len(here) > _MAX_REFERENCE_DEPTH:
                    self.report.add(path[:1], "expected a value, got a reference to a section that contains it")
                    value = None
                else:
                    value = self._resolved(value, here)
            values[key] = value
        return values if isinstance(container, DictConfig) else list(values.values())

    def _checked(self, values: dict[str, Any]) -> Config | None:
        """Validate the values. Sections whose classes are not named in Config are validated first, by those classes."""
        section, place = values.get("algorithm"), self.schema.algorithm
        known: dict[str, Any] = {"algorithm": AlgorithmConfig(name="unknown")}
        kind = section.get("name") if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(kind, str) and kind in place.variants:
            known |= self._validated("algorithm", section, place.variants[kind])
        else:
            self.report.unknown_kind(place, ("algorithm",))
        section = values.get("teacher")
        kind = section.get("backend") if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(kind, str) and kind in self.schema.own_teachers:
            known |= {"teacher": None} | self._validated("teacher", section, self.schema.own_teachers[kind])
        try:
            return Config.model_validate(values | known)
        except ValidationError as error:
            self.report.pydantic(error.errors(), (), self.schema.root)
            return None

    def _validated(self, name: str, section: dict[str, Any], model: type[BaseModel]) -> dict[str, BaseModel]:
        """{name: the section}; empty after mistakes, which are reported."""
        try:
            return {name: model.model_validate(section)}
        except ValidationError as error:
            self.report.pydantic(error.errors(), (name,), Slot((model,)))
            return {}


def _keep_set(section: Section, node: Node) -> None:
    """Restrict `model_fields_set` to the keys set in `node`; validation also marked the filled-in defaults."""
    if not isinstance(node.value, dict):  # a reference to another section: all its keys count as set
        return
    section.model_fields_set.intersection_update(node.value)
    for name, inner in node.value.items():
        below = getattr(section, name)
        if isinstance(below, Section):
            _keep_set(below, inner)


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(inner) for key, inner in node.value.items()}
    return [_plain(inner) for inner in node.value] if isinstance(node.value, list) else node.value


def _as_nodes(value: Any) -> Node:
    if isinstance(value, dict):
        return Node({key: _as_nodes(inner) for key, inner in value.items()}, "")
    return Node([_as_nodes(inner) for inner in value] if isinstance(value, list) else value, "")


def _why_unresolved(error: OmegaConfBaseException) -> str:
    reason = str(error).split("\n")[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
    return reason if "nvironment variable" in reason else f"{reason}; {_LITERAL_HINT}"
