"""Two evaluations of the same prompts: differences with intervals, and which prompts changed. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkd.run.evaluated import Record, aligned, bounds, per_prompt, powers, read, shown
from rlkd.run.statistics import interval, sign_test

_GREEDY = ("wrong", "right")
_SAMPLED = ("none", "some", "all")
_SETTINGS = ("temperature", "samples", "max_tokens", "seed", "rewards", "backend")
_SHOWN = 10
"""Changed prompts in the table; the JSON object has all."""


def compared(a: Path, b: Path) -> dict[str, Any]:
    """What changes from evaluation `a` to `b`, each the folder of an evaluation or of a run that has one.

    For each benchmark that both have, over the prompts that both have: `differences` (figure → mean of a, mean of b,
    mean difference of a prompt with its interval), `greedy` and `samples` (how many prompts went from what to what),
    `p` (the exact test that greedy answers change either way alike), and `changed` (prompts whose greedy answer became
    right or wrong).

    Raises: ValueError, one line, without a common benchmark or prompt, or where the prompts of an id differ.
    """
    (before, of_a), (after, of_b) = read(a), read(b)
    names = [name for name in of_a if name in of_b]
    if not names:
        raise ValueError(
            f"--compare: expected a benchmark that both have, got {', '.join(of_a)} in {a} and {', '.join(of_b)} in "
            f"{b}; evaluate both with the same --data"
        )
    notes = [
        f"{key} differs: {before[key]} in {a}, {after[key]} in {b}" for key in _SETTINGS if before[key] != after[key]
    ]
    notes += [f"only one of the two has {name}" for name in {**of_a, **of_b} if name not in names]
    max_tokens = max(before["max_tokens"], after["max_tokens"])
    benchmarks = {}
    for name in names:
        pairs, missing = _paired(name, of_a[name], of_b[name])
        if missing:
            notes.append(f"{name}: {missing} prompts are only in one of the two, and are left out")
        benchmarks[name] = _benchmark(pairs, max_tokens, after["seed"])
    sides = {side: summary["model"] for side, summary in (("a", before), ("b", after))}
    return {**sides, "notes": notes, "benchmarks": benchmarks}


def _paired(name: str, a: Sequence[Record], b: Sequence[Record]) -> tuple[list[tuple[Record, Record]], int]:
    """(the records of the same prompts, the number of prompts that only one has)."""
    of_b = {record["id"]: record for record in b}
    pairs = [(record, of_b[record["id"]]) for record in a if record["id"] in of_b]
    for one, other in pairs:
        if (one["prompt"], one["answer"]) != (other["prompt"], other["answer"]):
            raise ValueError(
                f"--compare: {name}: expected the same prompt and answer under the id {one['id'][:80]!r}, got two; "
                "evaluate both on the same data"
            )
    if not pairs:
        raise ValueError(
            f"--compare: {name}: expected prompts that both have, got none; evaluate both on the same data"
        )
    return pairs, len(a) + len(b) - 2 * len(pairs)


def _benchmark(pairs: Sequence[tuple[Record, Record]], max_tokens: int, seed: int) -> dict[str, Any]:
    a, b = [one for one, _ in pairs], [other for _, other in pairs]
    of_a, of_b = (per_prompt(records, powers(len(records[0]["samples"]))) for records in (a, b))
    differences = {}
    for figure in (figure for figure in of_a if figure in of_b):
        known = [(x, y) for x, y in zip(of_a[figure], of_b[figure], strict=True) if x is not None and y is not None]
        if known:
            low, high = bounds(figure, max_tokens)
            changes = [y - x for x, y in known]
            interval_low, interval_high = interval(changes, seed, (low - high, high - low))
            differences[figure] = {
                "a": sum(x for x, _ in known) / len(known),
                "b": sum(y for _, y in known) / len(known),
                "difference": sum(changes) / len(known),
                "low": interval_low,
                "high": interval_high,
                "prompts": len(known),
            }
    greedy = _transitions([(_greedy(x), _greedy(y)) for x, y in pairs], _GREEDY)
    changed = [
        {"id": x["id"], "from": _greedy(x), "to": _greedy(y), "answer": x["answer"]}
        | {"a": x["greedy"]["completion"], "b": y["greedy"]["completion"]}
        for x, y in pairs
        if None not in (_greedy(x), _greedy(y)) and _greedy(x) != _greedy(y)
    ]
    return {
        "prompts": len(pairs),
        "differences": differences,
        "greedy": greedy,
        "samples": _transitions([(_sampled(x), _sampled(y)) for x, y in pairs], _SAMPLED),
        "p": sign_test(greedy["right to wrong"], greedy["wrong to right"]),
        "changed": changed,
    }


def _greedy(record: Record) -> str | None:
    """None if the reward failed."""
    correct = record["greedy"]["correct"]
    return None if correct is None else _GREEDY[correct]


def _sampled(record: Record) -> str | None:
    """How many of the samples are correct."""
    rights = [sample["correct"] for sample in record["samples"]]
    return None if None in rights else _SAMPLED[any(rights) + all(rights)]


def _transitions(pairs: Sequence[tuple[str | None, str | None]], kinds: Sequence[str]) -> dict[str, int]:
    counts = Counter(pairs)
    return {f"{x} to {y}": counts[x, y] for x in kinds for y in kinds}


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as lines of text."""
    lines = [f"a: {comparison['a']}", f"b: {comparison['b']}", *(f"note: {note}" for note in comparison["notes"])]
    for name, found in comparison["benchmarks"].items():
        lines += ["", f"{name}, {found['prompts']} prompts"]
        rows = [("figure", "a", "b", "b − a", "95% interval")]
        for figure, change in found["differences"].items():
            a, b = shown(figure, change["a"]), shown(figure, change["b"])
            difference, low, high = (shown(figure, change[key], "+") for key in ("difference", "low", "high"))
            rows.append((figure, a, b, difference, f"{low} to {high}"))
        lines.append(aligned(rows))
        for kind, kinds in (("greedy", _GREEDY), ("samples", _SAMPLED)):
            matrix = [[f"{kind}: a ↓ b →", *kinds]]
            matrix += [[x, *(str(found[kind][f"{x} to {y}"]) for y in kinds)] for x in kinds]
            lines += ["", aligned(matrix)]
        lines += ["", f"exact test that greedy answers change either way alike: p = {found['p']:.3g}"]
        for change in found["changed"][:_SHOWN]:
            a, b = (" ".join(change[side].split())[-60:] for side in ("a", "b"))
            lines.append(f"{change['from']} → {change['to']}  {change['id']}: {a!r} → {b!r} ({change['answer']!r})")
        if len(found["changed"]) > _SHOWN:
            lines.append(f"and {len(found['changed']) - _SHOWN} more")
    return "\n".join(lines)
