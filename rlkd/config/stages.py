"""Runs with several stages: each starts from the previous stage's student and has its own run directory.

In YAML, `stages` maps each stage's name to the keys that differ from the rest of the file:

    run: {name: recipe}
    …
    stages:
      sft: {algorithm: {name: sft}, run: {iterations: 100}}
      kdrl: {algorithm: {name: kdrl}}

The run directories are then `runs/recipe/sft` and `runs/recipe/kdrl`.
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
from rlkd.storage.run_folder import export_record

_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Stage:
    """One part of a run."""

    name: str | None
    """None if the run has no stages."""
    loaded: Loaded
    starts_from: str | None
    """Export of the previous stage, used as model.path once that stage has finished; None: keep model.path."""


def load_stages(
    files: Sequence[str], overrides: Sequence[str], algorithms: Algorithms, learn: LearnOptions | None = None
) -> list[Stage]:
    """The stages of a configuration, all validated; a run without stages is a single stage.

    `algorithms` and `learn` are passed to `load`.
    Command-line overrides apply to every stage; `stages.NAME.key=value` applies to one.
    Raises: ConfigError with one line per mistake in the first invalid stage.
    """
    under, over, problems = read(files, overrides)
    shared, of_stages = _split_stages(under)
    command_line, of_command_line = _split_stages(over)
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
            loaded = checked(root, problems, algorithms, learn)
        except ConfigError as error:
            raise ConfigError([f"stage {name}: {line}" for line in error.lines]) from error
        run = loaded.config.run
        changes = {"run.dir": f"{run.dir}/{run.name}", "run.name": name}
        before = stages[-1].loaded.config if stages else None
        own_model = any(_sets_model_path(part) for part in (of_stages.get(name), of_command_line.get(name)))
        starts_from = None if before is None or own_model else f"{before.run_dir}/hf"
        stages.append(Stage(name, with_values(loaded, changes), starts_from))
    for stage in stages[:-1]:
        if not stage.loaded.config.checkpoint.export:
            line = (
                f"stage {stage.name}: checkpoint.export: is false, but the next stage starts from the exported student"
            )
            raise ConfigError([f"{line}; set it to true"])
    return stages


def with_values(loaded: Loaded, changes: dict[str, str]) -> Loaded:
    """The configuration with some string values replaced; `changes` maps section.key → value."""
    import yaml

    tree, values = yaml.safe_load(loaded.text), loaded.config
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
        values = values.model_copy(update={section: getattr(values, section).model_copy(update={name: value})})
    return Loaded(values, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def finished(config: Config) -> bool:
    """Whether a run is complete: the student of its last iteration is exported, and its report exists.

    With `run.stop_after`, its last iteration may be an earlier one. The report is written at every evaluation, after
    the last iteration and, with all samples, at the very end.
    """
    folder = Path(config.run_dir)
    record, limit = export_record(folder / "hf"), config.run.stop_after
    stopped = limit is not None and record.get("waited", 0) >= limit
    ended = stopped or record.get("iteration", 0) >= config.run.iterations
    return (folder / "report.html").exists() and ended


def _split_stages(root: Node) -> tuple[Node, dict[str, Node]]:
    """(the tree without `stages`, the stages). Raises: ConfigError if `stages` is not a mapping of mappings."""
    if not isinstance(root.value, dict) or "stages" not in root.value:
        return root, {}
    rest = {key: node for key, node in root.value.items() if key != "stages"}
    stages = root.value["stages"]
    if not isinstance(stages.value, dict) or not all(isinstance(n.value, dict) for n in stages.value.values()):
        raise ConfigError([f"{stages.origin}: stages: expected a mapping from each stage's name to its changes"])
    return replace(root, value=rest), stages.value


def _sets_model_path(changes: Node | None) -> bool:
    """Whether a stage sets model.path; other keys of `model`, such as lora, keep the previous stage's student."""
    model = None if changes is None else changes.value.get("model")
    return model is not None and isinstance(model.value, dict) and "path" in model.value
