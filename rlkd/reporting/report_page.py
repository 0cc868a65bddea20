"""Writes report.html of a run, one self-contained page made from the files of the run directory.

    python -m rlkd.report runs/quickstart

The page needs no network and no script: curves are inline SVG, and colours follow the reader's light or dark mode. It
can be written at any time during a run, and for a run that was killed. All text from a run is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from rlkd.config.schema import EvalConfig, RunConfig
from rlkd.reporting.metric_reference import METRICS, panels
from rlkd.reporting.svg_plots import Panel, Point, figure, finite_values, number
from rlkd.storage import atomic

_HUGE = 1e300  # beyond it the arithmetic of an axis overflows
_SAMPLES = 12


def write_report(run_dir: str | Path) -> Path:
    """Write `<run_dir>/report.html` from metrics.jsonl, config.yaml and the newest rollouts/*.jsonl; return its path.

    A truncated last line (the run is still writing, or was killed) is left out, and the page mentions it.

    Raises: ValueError if a file is missing or a line is invalid; the message names file and line.
    """
    run_dir = Path(run_dir)
    for name in ("metrics.jsonl", "config.yaml"):
        if not (run_dir / name).is_file():
            raise ValueError(f"expected a run directory, got {run_dir}, which has no {name}; use runs/<run.name>")
    rows, notes = _rows(run_dir / "metrics.jsonl")
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(config_text)
    # Keys with default values may be absent. References such as ${oc.env:X} may be secrets and are not resolved.
    run = RunConfig().model_dump() | config.get("run", {})
    evaluation = EvalConfig().model_dump() | config.get("eval", {})
    not_curves = {name for name, metric in METRICS.items() if not metric.plotted}
    series = {key: _series(rows, key) for key in sorted({key for row in rows for key in row} - not_curves)}

    done, planned = rows[-1]["iteration"] if rows else 0, run["iterations"]
    if isinstance(planned, int) and done < planned:
        notes.append(f"The run is unfinished: {done} of {planned} iterations.")
    name, algorithm, student = str(run["name"]), str(config["algorithm"]["name"]), str(config["model"]["path"])
    body = [
        f'<p class="soft">rlkd run report</p><h1>{escape(name)}</h1>'
        f'<p class="soft">{escape(algorithm)} on {escape(student)}</p>',
        _headline(series, done, f"of {planned}", evaluation["samples"]),
        *(f'<p class="notice">{escape(note)}</p>' for note in notes),
        '<p class="soft axis">Every curve is by iteration; values that were not finite leave a gap. '
        "docs/metrics.md explains each metric.</p>",
        *_curves(series),
        *_samples(run_dir / "rollouts"),
        f"<details><summary>Configuration</summary><pre>{escape(config_text)}</pre></details>",
    ]
    path = run_dir / "report.html"
    page = _PAGE.replace("{title}", escape(name)).replace("{style}", _STYLE).replace("{body}", "\n".join(body))
    # A completion may contain half a surrogate pair, which UTF-8 cannot encode; it is shown as \udXXX.
    atomic.write(path, page.encode("utf-8", errors="backslashreplace"))
    return path


# Reading ---------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], bool]:
    """([(line number, object)], whether the last line was truncated and is left out)."""
    lines = [(at, line) for at, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    objects: list[tuple[int, dict[str, Any]]] = []
    for at, line in lines:
        try:
            value = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if at == lines[-1][0]:
                return objects, True
            raise ValueError(f"{path}, line {at}: not JSON ({error}); correct or remove the line") from error
        if not isinstance(value, dict):
            raise ValueError(
                f"{path}, line {at}: expected one JSON object, got {value!r:.60}; correct or remove the line"
            )
        objects.append((at, value))
    return objects, False


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of metrics.jsonl sorted by iteration, and notes about them for the page."""
    objects, torn = _read_jsonl(path)
    notes = ["The last line of metrics.jsonl was cut off and is left out."] if torn else []
    rows: dict[int, dict[str, Any]] = {}
    repeated: set[int] = set()
    for at, row in objects:
        iteration = row.get("iteration")
        if type(iteration) is not int:
            raise ValueError(
                f"{path}, line {at}: expected an integer as iteration, got {iteration!r}; correct or remove the line"
            )
        for key, value in row.items():
            if value is not None and not isinstance(value, int | float):
                raise ValueError(
                    f"{path}, line {at}: expected a number or null as {key}, got {value!r:.60}; correct or remove the "
                    "line"
                )
        if iteration in rows:
            repeated.add(iteration)
        rows[iteration] = rows.get(iteration, {}) | row
    if repeated:
        span = f"{min(repeated)} to {max(repeated)}" if len(repeated) > 1 else f"{min(repeated)}"
        notes.append(f"Iteration {span} has several rows (a resumed run repeats some); the last ones are shown.")
    return [rows[iteration] for iteration in sorted(rows)], notes


def _series(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """The points of one metric. A row without the key gives no point; a row with null or NaN gives a gap."""
    return [(row["iteration"], _finite(row[key])) for row in rows if key in row]


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and abs(value) < _HUGE else None  # False for NaN too


# Headline --------------------------------------------------------------------------------------------------------


def _headline(series: dict[str, list[Point]], done: int, planned: str, samples: int | str) -> str:
    tiles = [_tile("Iterations", f"{done:,}", planned)]
    for key in (key for key in ("eval/greedy", "eval/avg@k", "eval/pass@k") if key in series):
        label = key.removeprefix("eval/").replace("@k", f"@{samples}")
        label = "Accuracy, greedy" if label == "greedy" else label
        points = [(at, value) for at, value in series[key] if value is not None]
        if not points:
            tiles.append(_tile(label, "—", "no value"))
            continue
        (first_at, first), (last_at, last) = points[0], points[-1]
        if len(points) == 1:
            tiles.append(_tile(label, f"{first:.1%}", f"one evaluation, after iteration {first_at:,}"))
        else:
            change = f"{100 * (last - first):+.1f} points, iteration {first_at:,} → {last_at:,}"
            tiles.append(_tile(label, f"{first:.1%} → {last:.1%}", change))
    seconds = finite_values(series.get("time/total", []))
    if seconds:
        tiles.append(_tile("Time", _duration(sum(seconds)), f"{sum(seconds) / len(seconds):.3g} s per iteration"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(label: str, value: str, detail: str) -> str:
    return f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(detail)}</span></div>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


# Curves ----------------------------------------------------------------------------------------------------------


def _curves(series: dict[str, list[Point]]) -> list[str]:
    others = tuple(Panel(key, (key,)) for key in series if key not in METRICS)
    iterations = [at for points in series.values() for at, _ in points]
    parts = []
    for title, plots in (*panels(), ("Other metrics", others)):
        present = [(plot, {key: series[key] for key in plot.keys if key in series}) for plot in plots]
        drawn = [figure(panel, curves, iterations) for panel, curves in present if curves]
        if drawn:
            parts.append(f'<h2>{escape(title)}</h2><div class="grid">{"".join(drawn)}</div>')
    return parts


# Samples ---------------------------------------------------------------------------------------------------------


def newest_rollouts(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """A few evenly spaced rollouts of the last iteration that was written to `folder`, and a description of them.

    Both are empty if there are no rollouts.
    """
    files = sorted(folder.glob("*.jsonl"), key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)])
    objects = [rollout for _, rollout in _read_jsonl(files[-1])[0]] if files else []
    if not objects:
        return [], ""
    newest = [rollout for rollout in objects if rollout.get("iteration") == objects[-1].get("iteration")]
    count = min(_SAMPLES, len(newest))
    what = f"{count} of the {len(newest):,} rollouts in {files[-1].name}"
    if "iteration" in newest[0]:
        what += f" of iteration {newest[0]['iteration']}"
    return [newest[i * len(newest) // count] for i in range(count)], what


def _samples(folder: Path) -> list[str]:
    """A table of the newest rollouts; empty if there are none."""
    chosen, what = newest_rollouts(folder)
    if not chosen:
        return []
    columns = ("prompt", "completion", "answer", "reward", "advantage", "finish_reason", "weight_version")
    shown = [column for column in columns if any(column in rollout for rollout in chosen)]
    head = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in shown)
    body = "".join(f"<tr>{''.join(_cell(rollout, column) for column in shown)}</tr>" for rollout in chosen)
    return [
        f'<h2>Samples</h2><p class="soft">{escape(what)}, evenly spaced.</p>'
        f'<div class="wide"><table class="samples"><tr>{head}</tr>{body}</table></div>'
    ]


def _cell(rollout: dict[str, Any], column: str) -> str:
    value = rollout.get(column)
    if value is None:
        return "<td>—</td>"
    if isinstance(value, int | float):
        return f'<td class="number">{number(value)}</td>'
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f'<td class="text"><div>{escape(text)}</div></td>'


# The page --------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · rlkd</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

# Colours c0–c5 are those of Okabe and Ito (distinguishable with any colour vision), darker on white and lighter on
# black; dashes distinguish the curves without any colour.
_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5b6470; --rule: #e3e6ea;
  --c0: #0072b2; --c1: #c75300; --c2: #00825e; --c3: #b0568a; --c4: #8a6a00; --c5: #3d3d3d; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2026; --ink: #e8eaed; --soft: #a3acb8;
  --rule: #323841; --c0: #56b4e9; --c1: #f08a3c; --c2: #2fc59a; --c3: #e29cc3; --c4: #f0e442; --c5: #d0d0d0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { margin: 0; font-size: 28px; overflow-wrap: anywhere; } h2 { margin: 34px 0 12px; font-size: 19px; }
.soft { margin: 0; color: var(--soft); }
.axis { margin-top: 18px; } h2 + .soft { margin-bottom: 10px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 18px; }
.tile, figure, details, .wide { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 16px; flex: 1 1 auto; } .tile span { display: block; color: var(--soft); font-size: 13px; }
.tile b { font-size: 21px; font-weight: 600; white-space: nowrap; }
.notice { background: var(--card); border-left: 4px solid var(--c1); padding: 9px 14px; margin: 14px 0 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 14px; }
/* Caption, plot and table of neighbours line up. */
figure { margin: 0; padding: 12px 14px 10px; display: grid; row-gap: 0;
  grid-row: span 3; grid-template: subgrid / minmax(0, 1fr); }
figcaption span { display: block; color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; margin: 6px 0 4px; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); } .y { text-anchor: end; } .x { text-anchor: middle; }
path { fill: none; stroke-width: 1.6; stroke-linejoin: round; } .rule { stroke: var(--rule); stroke-width: 1; }
.faint { stroke-width: 1; opacity: .4; } .bold { stroke-width: 2.2; }
path.c0 { stroke: var(--c0); } path.c1 { stroke: var(--c1); stroke-dasharray: 7 3; }
path.c2 { stroke: var(--c2); stroke-dasharray: 2 3; } path.c3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3; }
path.c4 { stroke: var(--c4); stroke-dasharray: 4 2; } path.c5 { stroke: var(--c5); stroke-dasharray: 1 2; }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
circle.c3 { fill: var(--c3); } circle.c4 { fill: var(--c4); } circle.c5 { fill: var(--c5); }
svg.swatch { display: inline-block; width: 26px; height: 10px; margin: 0; vertical-align: middle; }
table { border-collapse: collapse; width: 100%; align-self: start; font-size: 13px; }
figure th { text-align: left; font-weight: 400; overflow-wrap: anywhere; width: 100%; padding-left: 7px; }
figure td { text-align: right; white-space: nowrap; padding: 1px 0; } figure th ~ td { padding-left: 14px; }
td { font-variant-numeric: tabular-nums; } figure tr:first-child { color: var(--soft); } .gaps { color: var(--c1); }
.wide { overflow-x: auto; } .samples th, .samples td { padding: 8px 12px; text-align: left; vertical-align: top; }
.samples tr + tr { border-top: 1px solid var(--rule); } .samples .number { text-align: right; }
.text div { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 60px; max-width: 460px; max-height: 190px;
  overflow-y: auto; font: 13px/1.4 ui-monospace, monospace; }
details { margin-top: 34px; padding: 12px 16px; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 13px/1.45 ui-monospace, monospace; }
"""
