"""What an evaluation found: a record for each prompt, figures with intervals, and the folder that holds them.

Imports no torch, so that two evaluations are compared at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkd.run.statistics import Interval, interval, majority_at_k, pass_at_k
from rlkd.storage import atomic

Record = Mapping[str, Any]
"""A prompt: `id`, `prompt` (messages), `answer`, `greedy` (a completion) and `samples` (completions). A completion has
`completion` (its text), `reward`, `correct` (null if the reward failed), `error`, `vote`, `tokens`, `finish_reason`."""

SUMMARY = "summary.json"


def powers(samples: int) -> list[int]:
    """1, 2, 4, … and `samples`: the k of pass@k."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def per_prompt(records: Sequence[Record], ks: Sequence[int]) -> dict[str, list[float | None]]:
    """Figure → its value for each prompt; None where it is unknown, because a reward failed.

    `avg@n` is the mean of the n samples whose reward is known. `pass@k` and `majority@k` need all n. `majority@k` is
    left out if no sample has a vote. Raises: ValueError unless each k ≤ n.
    """
    samples = len(records[0]["samples"])
    known = [[s["correct"] for s in record["samples"] if s["correct"] is not None] for record in records]
    figures: dict[str, list[float | None]] = {
        "greedy": [None if r["greedy"]["correct"] is None else float(r["greedy"]["correct"]) for r in records],
        f"avg@{samples}": [sum(rights) / len(rights) if rights else None for rights in known],
    }
    for k in ks:
        figures[f"pass@{k}"] = [
            pass_at_k(samples, sum(rights), k) if len(rights) == samples else None for rights in known
        ]
    votes = [[sample["vote"] for sample in record["samples"]] for record in records]
    if any(vote is not None for of_prompt in votes for vote in of_prompt):
        for k in (k for k in ks if k > 1):
            figures[f"majority@{k}"] = [
                majority_at_k(of_prompt, rights, k) if len(rights) == samples else None
                for of_prompt, rights in zip(votes, known, strict=True)
            ]
    figures["greedy_tokens"] = [float(record["greedy"]["tokens"]) for record in records]
    figures["tokens"] = [sum(s["tokens"] for s in record["samples"]) / samples for record in records]
    return figures


def bounds(figure: str, max_tokens: int) -> Interval:
    """The least and the largest value of a figure."""
    return (0.0, float(max_tokens)) if figure.endswith("tokens") else (0.0, 1.0)


def figures(records: Sequence[Record], ks: Sequence[int], *, seed: int, max_tokens: int) -> dict[str, Any]:
    """Each figure as {mean, low, high, prompts}: its mean over the prompts for which it is known, and its interval.

    Also `truncated`, the share of samples that reached `max_tokens`, and `errors`, the number of failed rewards.
    """
    found: dict[str, Any] = {}
    for name, values in per_prompt(records, ks).items():
        known = [value for value in values if value is not None]
        if known:
            low, high = interval(known, seed, bounds(name, max_tokens))
            mean = sum(known) / len(known)
            found[name] = {"mean": mean, "low": low, "high": high, "prompts": len(known)}
    completions = [sample for record in records for sample in record["samples"]]
    found["truncated"] = sum(sample["finish_reason"] == "length" for sample in completions) / len(completions)
    greedy = [record["greedy"] for record in records]
    found["errors"] = sum(completion["correct"] is None for completion in (*greedy, *completions))
    return found


def write_records(records: Sequence[Record], file: Path) -> None:
    """Write one line for each prompt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, "".join(json.dumps(record) + "\n" for record in records).encode())


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list[Record]]]:
    """(the summary, the records of each benchmark) of an evaluation, or of a run that has one.

    Raises: ValueError, one line, if there is none.
    """
    found = next((place for place in (folder, folder / "evaluation") if (place / SUMMARY).is_file()), None)
    if found is None:
        raise ValueError(f"--compare: {folder} has no evaluation ({SUMMARY}); first run: rlkd evaluate {folder}")
    summary = json.loads((found / SUMMARY).read_text(encoding="utf-8"))
    records = {}
    for name in summary["benchmarks"]:
        with open(found / f"{name}.jsonl", encoding="utf-8") as file:
            records[name] = [json.loads(line) for line in file]
    return summary, records


def table(summary: Mapping[str, Any]) -> str:
    """The figures of each benchmark as lines of text."""
    rows = [("benchmark", "prompts", "figure", "mean", "95% interval")]
    for name, benchmark in summary["benchmarks"].items():
        for figure, found in benchmark.items():
            if isinstance(found, dict):
                low, high = (shown(figure, found[end]) for end in ("low", "high"))
                rows.append((name, str(found["prompts"]), figure, shown(figure, found["mean"]), f"{low} to {high}"))
        rows.append((name, str(benchmark["prompts"]), "truncated", shown("", benchmark["truncated"]), ""))
        if benchmark["errors"]:
            rows.append((name, str(benchmark["prompts"]), "failed rewards", str(benchmark["errors"]), ""))
    return aligned(rows)


def shown(figure: str, value: float, sign: str = "") -> str:
    """A figure as text: tokens as a number, all others in percent. `sign`: "+" to show it always."""
    return f"{value:{sign}.1f}" if figure.endswith("tokens") else f"{value:{sign}.1%}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
