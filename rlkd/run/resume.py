"""What a resumed run goes on from, and whether its configuration is still the one that made it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlkd.config.schema import Config, Section
from rlkd.data.sources import identity
from rlkd.storage.run_folder import DATA_FILE, FILE, checkpoints

FREE = re.compile(
    r"(run\.(dir|name|iterations|resume|accept_changes)|trainer\.(devices|num_nodes)|(log|eval|checkpoint)\..*"
    r"|reward\.(workers|timeout_s)|rollout\.server\..*|teacher\.(teachers\.[^.]+\.)?(urls?|server\..*))"
)
"""Keys that may change without a word: how long, where and on what a run runs, and what is looked at."""

FORMERLY: Mapping[str, Any] = {
    "algorithm.context.feedback_beside_sibling": True,
    "algorithm.ratio_cap": None,
    "data.special_tokens": "tokens",
}
"""Keys whose default is not what a run did before there was the key, and what it did then."""

_ROWS = re.compile(r"data\.(path|split|limit|\w+_column|messages\..*)")
"""Keys that say what the rows of the data hold: under other ones their digest is another too."""


def resume_path(config: Config) -> Path | None:
    """The checkpoint that `run.resume` names: none for never, the newest for auto (if any), or that path."""
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        whole = checkpoints(config.run_dir)
        return whole[-1] if whole else None
    return Path(config.run.resume)


def changes(config: Config) -> list[str]:
    """What stands in the way of resuming, one line a key; empty: nothing, or there is no checkpoint yet.

    Data that is another under the same `data.path` counts as a change of this key.

    A run that goes on under another learning rate, say, is no longer the run that its directory and its plots say it
    is: such a key must be named in `run.accept_changes`. A key that the checkpoint does not know is a newer one: it is
    no change as long as it has its default, or for those of FORMERLY the value that a run without the key went by.
    """
    checkpoint = resume_path(config)
    if checkpoint is None:
        return []
    try:
        saved = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"run.resume: {checkpoint} has no readable {FILE}: {error}; choose another checkpoint"]
    if "run" not in saved:  # a model's folder, say, which has a config.json too
        return [
            f"run.resume: {checkpoint} is no checkpoint of a run; wants never, auto, or <run>/checkpoints/iteration-…"
        ]
    before, now = dict(_leaves(saved)), dict(_leaves(config.model_dump(mode="json")))
    before = _formerly(now) | before
    unsaid = tuple(_unsaid(config))
    lines, changed = [], []
    for key in sorted(before.keys() | now.keys()):
        newer = key not in before and (key in unsaid or key.startswith(tuple(f"{name}." for name in unsaid)))
        if newer or before.get(key, _ABSENT) == now.get(key, _ABSENT):
            continue
        changed.append(key)
        if not _accepted(config, key) and not FREE.fullmatch(key):
            lines.append(
                f"{key}: is {now.get(key, 'absent')}, but {checkpoint.name} was trained with "
                f"{before.get(key, 'absent')}; put it back, or accept it by run.accept_changes=[{key}]"
            )
    if not any(map(_ROWS.fullmatch, changed)) and not _accepted(config, "data.path"):
        lines += _changed_data(config, checkpoint)
    return lines


_ABSENT = object()


def _accepted(config: Config, key: str) -> bool:
    """Whether `run.accept_changes` names a key, or the section that it is in."""
    return any(key == name or key.startswith(f"{name}.") for name in config.run.accept_changes)


def _changed_data(config: Config, checkpoint: Path) -> list[str]:
    """One line where the data is no longer what it was, though the configuration of it is the same."""
    try:
        saved = json.loads((checkpoint / DATA_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [f"run.resume: {checkpoint} has no readable {DATA_FILE}: {error}; choose another checkpoint"]
    found = asdict(identity(config.data))
    if found == saved:
        return []
    old, new = (f"{data['rows']} rows (SHA-256 {data['digest'][:12]}…)" for data in (saved, found))
    return [
        f"data.path: {config.data.path} now holds {new}, but {checkpoint.name} was trained on {old}; put the data "
        "back, or accept it by run.accept_changes=[data.path]"
    ]


def _formerly(now: Mapping[str, Any]) -> dict[str, Any]:
    """What of FORMERLY applies to the run `now`, {dotted key: value}.

    The `ratio_cap` of GRPO and its relatives is another key: it is as old as cispo, which alone reads it.
    """
    distils = "algorithm.divergence.kind" in now
    return {key: old for key, old in FORMERLY.items() if key in now and (distils or key != "algorithm.ratio_cap")}


def _unsaid(section: Section, place: Any = None, above: str = "") -> Iterator[str]:
    """Keys of `section` that still have their default.

    `place`: the default section here, whose values override the fields' own defaults.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        default = getattr(place, name) if type(place) is type(section) else field.default
        if isinstance(value, Section):
            yield from _unsaid(value, default, f"{above}{name}.")
        elif value == default:
            yield f"{above}{name}"


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value). The sections in a list are numbered; a list of anything else is one value."""
    for name, value in tree.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
