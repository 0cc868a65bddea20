"""Finds the checkpoint to resume from, and checks whether the configuration has changed since."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlkd.config.schema import Config, Section
from rlkd.data.heldout import part_of
from rlkd.data.mixture import identity
from rlkd.distributed import compute_dtype
from rlkd.storage.run_folder import DATA_FILE, FILE, checkpoints

FREE = re.compile(
    r"(run\.(dir|name|iterations|stop_after|resume|accept_changes)|trainer\.(devices|num_nodes)|(log|checkpoint)\..*"
    r"|eval\.(?!fraction).*"
    r"|reward\.(workers|timeout_s)|rollout\.server\..*|teacher\.(teachers\.[^.]+\.)?(urls?|server\..*))"
)
"""Keys that may change on resume: how long, where and on which devices a run runs, and what it logs and evaluates.
`eval.fraction` is none of them, since it also decides what is trained on."""

FORMERLY: Mapping[str, Any] = {
    "algorithm.context.feedback_beside_sibling": True,
    "algorithm.ratio_cap": None,
    "data.special_tokens": "tokens",
}
"""Keys whose default differs from the behaviour of runs from before the key existed → the value for that behaviour."""

_ROWS = re.compile(r"data\.(path|mix\..*|split|limit|\w+_column|messages\..*)|eval\.fraction.*")
"""Keys that determine the rows of the data: if one of them changes, so does the digest of the rows."""


def resume_path(config: Config) -> Path | None:
    """The checkpoint to resume from: none for `run.resume` never, the newest for auto (if any), or the given path."""
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        complete = checkpoints(config.run_dir)
        return complete[-1] if complete else None
    return Path(config.run.resume)


def as_run(config: Config) -> Config:
    """`config` with the type that `trainer.precision: auto` stands for on this machine. A checkpoint records this, so
    that a run which is resumed on another kind of hardware does not change its precision in silence."""
    trainer = config.trainer
    half = compute_dtype(trainer.precision, trainer.accelerator) == torch.bfloat16
    return config.model_copy(update={"trainer": trainer.model_copy(update={"precision": "bf16" if half else "fp32"})})


def changes(config: Config) -> list[str]:
    """The changes that prevent resuming, one line per key; empty if there are none or there is no checkpoint yet.

    If the data under the same `data.path` has changed, this counts as a change of that key.

    A run that continues with, for example, another learning rate is no longer the run that its directory and plots
    describe, so such a key must be named in `run.accept_changes`. A key that the checkpoint lacks was added later: it
    counts as unchanged if it has its default or, for the keys in FORMERLY, the value given there.
    """
    checkpoint = resume_path(config)
    if checkpoint is None:
        return []
    try:
        saved = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"run.resume: {checkpoint} has no readable {FILE}: {error}; choose another checkpoint"]
    if "run" not in saved:  # for example a model folder, which has a config.json too
        return [
            f"run.resume: expected never, auto or <run>/checkpoints/iteration-…, got {checkpoint}, which is not a "
            "checkpoint of a run; choose another"
        ]
    before, now = dict(_leaves(saved)), dict(_leaves(as_run(config).model_dump(mode="json")))
    before = _formerly(now) | before
    defaults = tuple(_default_keys(config))
    lines, changed = [], []
    for key in sorted(before.keys() | now.keys()):
        newer = key not in before and (key in defaults or key.startswith(tuple(f"{name}." for name in defaults)))
        if newer or before.get(key, _ABSENT) == now.get(key, _ABSENT):
            continue
        changed.append(key)
        if not _accepted(config, key) and not FREE.fullmatch(key):
            lines.append(
                f"{key}: expected {before.get(key, 'absent')}, with which {checkpoint.name} was trained, got "
                f"{now.get(key, 'absent')}; change it back, or accept it with run.accept_changes=[{key}]"
            )
    if not any(map(_ROWS.fullmatch, changed)) and not _accepted(config, "data.path"):
        lines += _changed_data(config, checkpoint)
    return lines


_ABSENT = object()


def _accepted(config: Config, key: str) -> bool:
    """Whether `run.accept_changes` names the key or a section that contains it."""
    return any(key == name or key.startswith(f"{name}.") for name in config.run.accept_changes)


def _changed_data(config: Config, checkpoint: Path) -> list[str]:
    """One line if the data has changed although its configuration is the same."""
    try:
        saved = json.loads((checkpoint / DATA_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [f"run.resume: {checkpoint} has no readable {DATA_FILE}: {error}; choose another checkpoint"]
    found = asdict(identity(config.data, part_of(config, held_out=False)))
    if found == saved:
        return []
    old, new = (f"{data['rows']} rows (SHA-256 {data['digest'][:12]}…)" for data in (saved, found))
    return [
        f"data.path: expected {config.data.path} to have {old}, on which {checkpoint.name} was trained, got {new}; "
        "restore the data, or accept the change with run.accept_changes=[data.path]"
    ]


def _formerly(now: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of FORMERLY that apply to the run `now`, {dotted key: value}.

    The `ratio_cap` of GRPO and its subclasses is a different key: only cispo uses it, and it is as old as cispo.
    """
    distils = "algorithm.divergence.kind" in now
    return {key: old for key, old in FORMERLY.items() if key in now and (distils or key != "algorithm.ratio_cap")}


def _default_keys(section: Section, place: Any = None, above: str = "") -> Iterator[str]:
    """The keys of `section` that have their default value.

    `place`: the default of the whole section, whose values take precedence over the defaults of its fields.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        default = getattr(place, name) if type(place) is type(section) else field.default
        if isinstance(value, Section):
            yield from _default_keys(value, default, f"{above}{name}.")
        elif value == default:
            yield f"{above}{name}"


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all leaves. Sections in a list are numbered; any other list is one value."""
    for name, value in tree.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
