"""Completions that were sampled ahead, in a checkpoint: a resumed run has other weights to sample them again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlkd import distributed
from rlkd.types import Prompt, Rollout, Segment, VersionSpan

Key = tuple[int, int]
"""(iteration, index of the prompt in this rank's share)"""


def _file(folder: Path) -> Path:
    return folder / f"sampled_ahead-rank{distributed.rank()}.json"


def save(rollouts: Mapping[Key, Sequence[Rollout]], folder: Path) -> None:
    """Write this rank's groups into a checkpoint's folder; nothing where there are none."""
    if rollouts:
        found = [[*key, group[0].prompt.id, [_as_json(r) for r in group]] for key, group in sorted(rollouts.items())]
        _file(folder).write_text(json.dumps(found), encoding="utf-8")


def load(folder: Path) -> dict[Key, tuple[str, list[dict[str, Any]]]]:
    """By key: the prompt's id and what `restored` reads. Empty where the checkpoint has none for this rank."""
    file = _file(folder)
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {(iteration, index): (name, group) for iteration, index, name, group in found}


def restored(prompt: Prompt, group: Sequence[Mapping[str, Any]]) -> list[Rollout]:
    """The rollouts of a prompt as they were saved, bit for bit."""
    return [
        Rollout(
            prompt=prompt,
            token_ids=tuple(one["token_ids"]),
            logprobs=tuple(one["logprobs"]),
            weight_versions=tuple(VersionSpan(start=a, end=b, version=v) for a, b, v in one["weight_versions"]),
            finish_reason=one["finish_reason"],
            segments=tuple(Segment(author=author, start=a, end=b) for author, a, b in one["segments"]),
            note=one["note"],
            top_ids=None if one["top_ids"] is None else torch.tensor(one["top_ids"]),
        )
        for one in group
    ]


def _as_json(rollout: Rollout) -> dict[str, Any]:
    return {
        "token_ids": rollout.token_ids,
        "logprobs": rollout.logprobs,
        "weight_versions": [[span.start, span.end, span.version] for span in rollout.weight_versions],
        "finish_reason": rollout.finish_reason,
        "segments": [[part.author, part.start, part.end] for part in rollout.segments],
        "note": rollout.note,
        "top_ids": None if rollout.top_ids is None else rollout.top_ids.tolist(),
    }
