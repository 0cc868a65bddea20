"""A few rollouts of a run over time, from rollouts/*.jsonl, with what is known about each of their tokens."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.reporting.curves import finite, rounded

ITERATIONS, EACH = 16, 6
"""How many iterations of a run are shown, and rollouts of each."""
HEAD, TAIL = 500, 300
"""Of a longer completion, the tokens at its start and end that are shown."""
TEXT = 4000
"""Characters of a prompt that are shown, at its start and end."""
_LOOKED_AT = 32  # rollouts of an iteration from which EACH are chosen


def newest_rollouts(folder: Path, count: int = 12) -> list[dict[str, Any]]:
    """About `count` rollouts, evenly spaced, of the last iteration that was written to `folder`."""
    files = _files(folder)
    return _some_lines(files[max(files)][-1], count) if files else []


def samples(folder: Path, iterations: int = ITERATIONS) -> list[dict[str, Any]]:
    """Rollouts of the first, the last and evenly spaced iterations between, as the page shows them.

    Of an iteration: those with the lowest and the highest reward, one whose reward failed, and others, evenly spaced.
    A file is sampled without being read as a whole, since the report is written during the run.
    """
    files = _files(folder)
    found = []
    for index, iteration in enumerate(_spaced(sorted(files), iterations)):
        path = files[iteration][index % len(files[iteration])]
        rollouts = _some_lines(path, _LOOKED_AT)
        chosen = [rollouts[i] for i in _chosen(rollouts)]
        _add_what_the_trainer_found(chosen, path.parent.parent / "tokens" / f"{path.stem}.npz")
        found += [_sample(rollout, iteration) for rollout in chosen]
    return found


def _add_what_the_trainer_found(rollouts: list[dict[str, Any]], path: Path) -> None:
    """Add `gaps` and `entropies` to rollouts, as far as they are in the file `path` (`write_by_token`)."""
    if not path.exists():
        return
    with np.load(path) as arrays:
        lengths = arrays["lengths"]
        ends = np.cumsum(lengths)
        for name in {"gaps", "entropies"} & set(arrays.files):
            values = arrays[name]
            for rollout in rollouts:
                end, length = int(ends[rollout["row"]]), int(lengths[rollout["row"]])
                rollout[name] = values[end - length : end].tolist()


def _files(folder: Path) -> dict[int, list[Path]]:
    """By iteration: its files, one of each rank."""
    files = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        digits = re.match(r"\d+", path.name)
        if digits:
            files[int(digits[0])].append(path)
    return files


def _spaced(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


def _some_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """About `count` evenly spaced lines of a file, all of a small one. Raises: ValueError for one that is not JSON."""
    lines = {}
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        for i in range(4 * count):
            file.seek(size * i // (4 * count))
            if i:
                file.readline()  # the rest of the line in which it landed
            at = file.tell()
            if at not in lines and at < size:
                lines[at] = file.readline()
    try:
        return [json.loads(lines[at]) for at in _spaced(sorted(lines), count)]
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); correct or remove the file") from error


def _chosen(rollouts: list[dict[str, Any]]) -> list[int]:
    """The indices of EACH of the rollouts, in order."""
    every = list(range(len(rollouts)))
    by_reward = sorted((i for i in every if rollouts[i].get("reward") is not None), key=lambda i: rollouts[i]["reward"])
    failed = [i for i in every if rollouts[i].get("error")]
    first = [*by_reward[:1], *by_reward[-1:], *failed[:1]]
    return sorted(list(dict.fromkeys([*first, *_spaced(every, EACH)]))[:EACH])


def _sample(rollout: dict[str, Any], iteration: int) -> dict[str, Any]:
    """A rollout as the page shows it. Only what the file has; older files have no `token_ends`."""
    sample = {"iteration": rollout.get("iteration", iteration)}
    for key in ("id", "answer", "error", "finish_reason", "weight_version"):
        if rollout.get(key) is not None:
            sample[key] = rollout[key]
    for key in ("reward", "advantage"):
        sample[key] = None if rollout.get(key) is None else rounded(finite(rollout[key]))
    parts = rollout.get("reward_parts") or {}
    sample["parts"] = {name: rounded(finite(value)) for name, value in parts.items()}
    prompt, text = str(rollout.get("prompt", "")), str(rollout.get("completion", ""))
    sample["prompt"] = prompt if len(prompt) <= TEXT else f"{prompt[: TEXT // 2]} […] {prompt[-TEXT // 2 :]}"
    ends = rollout.get("token_ends")
    if ends is None:
        limit = 4 * (HEAD + TAIL)
        return sample | {"text": text if len(text) <= limit else f"{text[: limit // 2]} […] {text[-limit // 2 :]}"}
    length = len(ends)
    cut = max(0, length - HEAD - TAIL)
    kept = list(range(length)) if not cut else [*range(HEAD), *range(length - TAIL, length)]
    sample |= {
        "length": length,
        "cut": cut,
        "head": HEAD,
        "tokens": [text[ends[t - 1] if t else 0 : ends[t]] for t in kept],
    }
    for key, short in (("logprobs", "logp"), ("teacher_logprobs", "teacher"), ("gaps", "gap"),
                       ("entropies", "entropy")):  # fmt: skip
        if rollout.get(key):
            sample[short] = [rounded(finite(rollout[key][t]), 4) for t in kept]
    if rollout.get("token_ids"):
        sample["ids"] = [rollout["token_ids"][t] for t in kept]
    if rollout.get("segments"):
        authors = ["student"] * length
        for author, start, end in rollout["segments"]:
            authors[start:end] = [author] * (end - start)
        sample["authors"] = [authors[t] for t in kept]
    return sample
