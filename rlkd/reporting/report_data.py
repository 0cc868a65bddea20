"""The data of a report page: a few runs, each with its curves, the figures of the first screen, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkd.reporting.curves import Point, curve, is_flat, points_of, values_of
from rlkd.reporting.metric_reference import METRICS, Panel, panels
from rlkd.reporting.run_files import RunFiles, read_stages
from rlkd.reporting.samples import ITERATIONS, samples

_EDGE = 10
"""Iterations at the start and the end of a run whose means are compared on the first screen."""


def report_data(folders: Sequence[str | Path]) -> dict[str, Any]:
    """What the page shows of the runs in `folders`, one or more, ready for JSON. Its size is bounded.

    Raises: ValueError as `read_stages`.
    """
    labels = _labels(folders)
    runs, points = [], []
    for folder, label in zip(folders, labels, strict=True):
        stages = read_stages(folder)
        run, series = _run(stages, label, max(4, ITERATIONS // len(folders)))
        runs.append(run)
        points.append(series)
    return {"runs": runs, "sections": _sections(points)}


def _labels(folders: Sequence[str | Path]) -> list[str]:
    """Short names of the runs that are all different: as many of the last parts of their paths as that takes."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(len(each) for each in parts) + 1):
        labels = ["/".join(each[-count:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"expected different runs, got {', '.join(map(str, folders))}; name each once")


def _run(stages: list[RunFiles], label: str, iterations: int) -> tuple[dict[str, Any], dict[str, list[Point]]]:
    """(what the page shows of a run, all points of its metrics). The iterations of its stages are counted on."""
    rows: dict[int, dict[str, Any]] = {}
    described, shown, notes, start = [], [], [], 0
    for index, stage in enumerate(stages):
        name, planned = stage.folder.name, stage.config["run"]["iterations"]
        for row in stage.rows:
            at = start + row["iteration"]
            rows[at] = rows.get(at, {}) | row | {"iteration": at}
        prefix = f"{name}: " if len(stages) > 1 else ""
        notes += [prefix + note for note in stage.notes]
        if isinstance(planned, int) and stage.done < planned:
            notes.append(f"{prefix}{stage.done:,} of {planned:,} iterations are done.")
        described.append(
            {
                "name": name,
                "algorithm": str(stage.config["algorithm"]["name"]),
                "student": str(stage.config["model"]["path"]),
                "start": start,
                "done": stage.done,
                "planned": planned,
                "config": stage.config_text,
            }
        )
        found = samples(stage.folder / "rollouts", max(2, iterations // len(stages)))
        shown += [sample | {"stage": index, "at": start + sample["iteration"]} for sample in found]
        start += stage.done
    keys = sorted({key for row in rows.values() for key in row} - {n for n, m in METRICS.items() if not m.plotted})
    series = {key: points_of(rows.values(), key) for key in keys}
    run = {
        "label": label,
        "stages": described,
        "notes": notes,
        "tiles": _tiles(series, described, stages[-1].config["eval"]["samples"]),
        "series": {key: curve(points, smooth=key in METRICS and METRICS[key].smooth) for key, points in series.items()},
        "samples": shown,
    }
    return run, series


def _sections(runs: Sequence[dict[str, list[Point]]]) -> list[dict[str, Any]]:
    """The plots that have a point in any run, by section. `flat`: every curve of theirs is constant."""
    others = sorted({key for series in runs for key in series} - set(METRICS))
    sections = []
    for title, plots in (*panels(), ("Other metrics", [Panel(key, (key,)) for key in others])):
        drawn = []
        for panel in plots:
            present = [key for key in panel.keys if any(key in series for series in runs)]
            curves = [series[key] for series in runs for key in present if key in series]
            if present:
                drawn.append(
                    {
                        "title": panel.title,
                        "keys": present,
                        "names": [METRICS[key].title if key in METRICS else key for key in present],
                        "help": [METRICS[key].help if key in METRICS else "" for key in present],
                        "unit": panel.note,
                        "share": panel.share,
                        "rounding": panel.rounding,
                        "flat": all(len(points) > 1 and is_flat(points, panel.rounding) for points in curves),
                    }
                )
        if drawn:
            sections.append({"title": title, "panels": drawn})
    return sections


# The first screen: did it learn? ---------------------------------------------------------------------------------


def _tiles(series: dict[str, list[Point]], stages: list[dict[str, Any]], samples_k: Any) -> list[dict[str, str]]:
    tiles = []
    for key in ("eval/greedy", "eval/avg@k", "eval/pass@k"):
        label = {"eval/greedy": "Accuracy, greedy"}.get(key, key.removeprefix("eval/").replace("@k", f"@{samples_k}"))
        points = [(at, value) for at, value in series.get(key, []) if value is not None]
        if len(points) == 1:
            detail = f"one evaluation, after iteration {points[0][0]:,}"
            tiles.append(_tile(key, label, f"{points[0][1]:.1%}", detail))
        elif points:
            (first_at, first), (last_at, last) = points[0], points[-1]
            detail = f"{100 * (last - first):+.1f} points, iteration {first_at:,} → {last_at:,}"
            tiles.append(_tile(key, label, f"{first:.1%} → {last:.1%}", detail))
    for keys, label in (
        (("reward/mean",), "Reward"),
        (("completion/length",), "Completion length"),
        (("kd/kl", "kd/divergence", "reference/kl"), ""),
        (("loss", "nll"), ""),
    ):
        present = [key for key in keys if values_of(series.get(key, []))]
        if present:
            key, values = present[0], values_of(series[present[0]])
            edge = max(1, min(_EDGE, len(values) // 2))
            first, last = sum(values[:edge]) / edge, sum(values[-edge:]) / edge
            detail = f"means of the first and last {edge} iterations" if edge > 1 else "first and last iteration"
            if len(values) == 1:
                detail = "one iteration"
            value = number(last) if len(values) == 1 else f"{number(first)} → {number(last)}"
            tiles.append(_tile(key, label or METRICS[key].title, value, detail))
    seconds = values_of(series.get("time/total", []))
    done = sum(stage["done"] for stage in stages)
    planned = " + ".join(grouped(stage["planned"]) for stage in stages)
    per = f", {number(sum(seconds) / len(seconds))} s each" if seconds else ""
    value = f"{done:,}" + (f" in {duration(sum(seconds))}" if seconds else "")
    tiles.append(_tile("", "Iterations", value, f"of {planned}{per}"))
    return tiles


def _tile(key: str, label: str, value: str, detail: str) -> dict[str, str]:
    return {"key": key, "label": label, "value": value, "detail": detail}


def grouped(planned: Any) -> str:
    """A number of iterations with grouped thousands; a reference such as ${oc.env:N} as it is."""
    return f"{planned:,}" if isinstance(planned, int) else str(planned)


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def number(value: float) -> str:
    """A number for display, with three significant digits and grouped thousands."""
    return (f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}").replace("-", "−")
