"""A run of several stages: each goes on with the student of the one before, in a directory of its own.

In YAML, `stages` maps a stage's name to what it changes of the rest of the file:

    run: {name: recipe}
    …
    stages:
      sft: {algorithm: {name: sft}, run: {iterations: 100}}
      kdrl: {algorithm: {name: kdrl}}

`runs/recipe/sft` and `runs/recipe/kdrl` are then ordinary run directories.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlkd.config.help import Algorithms, LearnOptions
from rlkd.config.load import ConfigError, Loaded, checked, on_top, read
from rlkd.config.schema import Config
from rlkd.config.yaml_tree import Node
from rlkd.storage.run_folder import exported

_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Stage:
    """One part of a run."""

    name: str | None
    """None: the run has no stages."""
    loaded: Loaded
    starts_from: str | None
    """Where the student comes from, once the stage before has ended; None: model.path as it stands."""


def load_stages(
    files: Sequence[str], overrides: Sequence[str], algorithms: Algorithms, learn: LearnOptions | None = None
) -> list[Stage]:
    """The stages of a configuration, all checked; a run without stages is one stage.

    `algorithms` and `learn` are those of `load`.
    What is written on the command line holds for every stage; `stages.NAME.key=value` for one.
    Raises: ConfigError with one line per mistake of the first wrong stage.
    """
    under, over, problems = read(files, overrides)
    shared, of_stages = _apart(under)
    command_line, of_command_line = _apart(over)
    names = list(dict.fromkeys([*of_stages, *of_command_line]))
    if not names:
        return [Stage(None, checked(on_top(shared, command_line), problems, algorithms, learn), None)]
    stages: list[Stage] = []
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError([f"stages: expected a directory name of letters, digits and . + - _, got {name!r}"])
        root = shared
        for node in (of_stages.get(name), command_line, of_command_line.get(name)):
            root = root if node is None else on_top(root, node)
        try:
            whole = checked(root, problems, algorithms, learn)
        except ConfigError as error:
            raise ConfigError([f"stage {name}: {line}" for line in error.lines]) from error
        run = whole.config.run
        changes = {"run.dir": f"{run.dir}/{run.name}", "run.name": name}
        before = stages[-1].loaded.config if stages else None
        own_model = any(_names_model(part) for part in (of_stages.get(name), of_command_line.get(name)))
        starts_from = None if before is None or own_model else f"{before.run_dir}/hf"
        stages.append(Stage(name, with_values(whole, changes), starts_from))
    for stage in stages[:-1]:
        if not stage.loaded.config.checkpoint.export:
            line = (
                f"stage {stage.name}: checkpoint.export: is false, but the next stage starts from the exported student"
            )
            raise ConfigError([f"{line}; set it to true"])
    return stages


def with_values(loaded: Loaded, changes: dict[str, str]) -> Loaded:
    """The configuration with some texts replaced: dotted key → value."""
    import yaml

    tree, values = yaml.safe_load(loaded.text), loaded.config
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
        values = values.model_copy(update={section: getattr(values, section).model_copy(update={name: value})})
    return Loaded(values, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def finished(config: Config) -> bool:
    """Whether a run has left the student of all its iterations, and a report: these are written last."""
    folder = Path(config.run_dir)
    return (folder / "report.html").exists() and exported(folder) >= config.run.iterations


def _apart(root: Node) -> tuple[Node, dict[str, Node]]:
    """(the tree without stages, the stages). Raises: ConfigError where they are no mapping."""
    if not isinstance(root.value, dict) or "stages" not in root.value:
        return root, {}
    rest = {key: node for key, node in root.value.items() if key != "stages"}
    stages = root.value["stages"]
    if not isinstance(stages.value, dict) or not all(isinstance(n.value, dict) for n in stages.value.values()):
        raise ConfigError([f"{stages.origin}: stages: expected a mapping from each stage's name to its changes"])
    return replace(root, value=rest), stages.value


def _names_model(changes: Node | None) -> bool:
    """Whether a stage brings a student of its own; other settings of `model`, such as adapters, leave it the last's."""
    model = None if changes is None else changes.value.get("model")
    return model is not None and isinstance(model.value, dict) and "path" in model.value
