"""Plots metrics by iteration as inline SVG: a Panel and its series become one <figure> with a small table of values.

The SVG uses CSS classes (c0 to c5, faint, bold, rule, x, y, swatch); the page's style sets colours, dashes and sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

Point = tuple[int, float | None]
"""(iteration, value). None is a gap in the curve, for null, NaN or an infinity."""


@dataclass(frozen=True)
class Panel:
    """One plot: the names of its metrics, and how to draw them."""

    title: str
    keys: tuple[str, ...]
    note: str = ""
    share: bool = False
    """The axis spans 0 to 1, so that plots of shares are easy to compare."""
    smooth: bool = False
    """With enough points, draw a running mean over the curve and mention it in the caption."""
    rounding: float = 0.0
    """Values that differ by less are treated as equal up to rounding, for example a loss of 1e-9 and one of −1e-9."""


_WINDOW = 10  # points of the running mean
_SINGLE = 1e-6  # relative; single-precision sums of the same values in another order differ by less
_COLOURS = 6

# The plot's own coordinates; the page scales them to the column.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 200, 58, 14, 10, 26


def figure(panel: Panel, series: dict[str, list[Point]], iterations: Sequence[int]) -> str:
    """The panel as HTML: title, plot over the range of `iterations`, and min, max and last value of each series.

    Args:
        series: the panel's metrics, at least one, each with at least one point.
    """
    smooth = panel.smooth and max(len(finite_values(points)) for points in series.values()) >= 5 * _WINDOW
    note = panel.note + (f"; bold: mean of last {_WINDOW}" if smooth else "")
    rows = []
    for index, (key, points) in enumerate(series.items()):
        finite = finite_values(points)
        low, high = (number(min(finite)), number(max(finite))) if finite else ("—", "—")
        last = "—" if points[-1][1] is None else number(points[-1][1])
        gaps = len(points) - len(finite)
        name = escape(key) + (f' <span class="gaps">{gaps} not finite</span>' if gaps else "")
        rows.append(f"<tr><td>{_swatch(index)}</td><th>{name}</th><td>{low}</td><td>{high}</td><td>{last}</td></tr>")
    return (
        f"<figure><figcaption><b>{escape(panel.title)}</b> <span>{escape(note)}</span></figcaption>"
        f"{_svg(panel, series, iterations, smooth)}"
        f"<table><tr><td></td><th></th><td>min</td><td>max</td><td>last</td></tr>{''.join(rows)}</table></figure>"
    )


def _svg(panel: Panel, series: dict[str, list[Point]], iterations: Sequence[int], smooth: bool) -> str:
    finite = [value for points in series.values() for value in finite_values(points)]
    if panel.share:
        finite += [0.0, 1.0]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if high - low <= max(_SINGLE * largest, panel.rounding):  # a constant: widen the axis, so that it looks like one
        room = 0.1 * largest
        low, high = (low - room, high + room) if largest > panel.rounding else (0.0, 1.0)
    first, last = min(iterations), max(max(iterations), min(iterations) + 1)

    def x(iteration: float) -> float:
        return _LEFT + (iteration - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value, label in _ticks(low, high):
        parts.append(f'<path class="rule" d="M{_LEFT},{y(value):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 7}" y="{y(value) + 4:.1f}">{label}</text>')
    for value, label in _ticks(first, last, whole=True):
        parts.append(f'<text class="x" x="{x(value):.1f}" y="{_HEIGHT - 8}">{label}</text>')
    for index, (key, points) in enumerate(series.items()):
        colour = f"c{index % _COLOURS}"
        sparse = len(points) <= 40
        for run in _unbroken(points):
            coordinates = [(x(at), y(value)) for at, value in run]
            parts.append(_path(coordinates, f"{colour} faint" if smooth else colour))
            if smooth:
                means = [(x(run[i][0]), y(_trailing_mean(run, i))) for i in range(len(run))]
                parts.append(_path(means, f"{colour} bold"))
            if sparse or len(run) == 1:
                for (px, py), (at, value) in zip(coordinates, run, strict=True):
                    tip = f"<title>{escape(key)}, iteration {at:,}: {number(value)}</title>"
                    parts.append(f'<circle class="{colour}" cx="{px:.1f}" cy="{py:.1f}" r="2.4">{tip}</circle>')
    if not finite_values(point for points in series.values() for point in points):
        parts.append(f'<text class="x" x="{_WIDTH / 2}" y="{_HEIGHT / 2}">no finite value</text>')
    label = escape(f"{panel.title}: {', '.join(series)} by iteration")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _unbroken(points: Sequence[Point]) -> list[list[tuple[int, float]]]:
    """The stretches between gaps."""
    stretches = groupby(points, key=lambda point: point[1] is not None)
    return [[(at, value) for at, value in stretch if value is not None] for finite, stretch in stretches if finite]


def _path(coordinates: Sequence[tuple[float, float]], css_class: str) -> str:
    if len(coordinates) < 2:
        return ""
    return f'<path class="{css_class}" d="M{"L".join(f"{px:.1f},{py:.1f}" for px, py in coordinates)}"/>'


def finite_values(points: Iterable[Point]) -> list[float]:
    """The values of `points` without the gaps."""
    return [value for _, value in points if value is not None]


def _swatch(index: int) -> str:
    line = f'<path class="c{index % _COLOURS} bold" d="M1,5L25,5"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="swatch" viewBox="0 0 26 10" aria-hidden="true">{line}</svg>'


def _trailing_mean(run: Sequence[tuple[int, float]], index: int) -> float:
    window = [value for _, value in run[max(0, index + 1 - _WINDOW) : index + 1]]
    return sum(window) / len(window)


def _ticks(low: float, high: float, whole: bool = False) -> list[tuple[float, str]]:
    """Two to six multiples of 1, 2 or 5 · 10^n in [low, high], with labels that are all different."""
    rough = (high - low) / 5
    power = math.floor(math.log10(rough))
    step = next(factor * 10.0**power for factor in (1, 2, 5, 10) if factor * 10.0**power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    # The tolerance keeps an end point that is a multiple of the step despite rounding.
    values = [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]
    if step >= 1 and max(abs(low), abs(high)) < 1e6:
        return [(value, f"{value:,.0f}") for value in values]
    largest = max(abs(value) for value in values)
    digits = math.floor(math.log10(largest)) - math.floor(math.log10(step)) + 1
    return [(value, _short(f"{value:.{digits}g}")) for value in values]


def number(value: float) -> str:
    """A number for display, with four significant digits and grouped thousands."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else _short(f"{value:.4g}")


def _short(number: str) -> str:
    return re.sub(r"e([+-])0*(\d)", lambda match: f"e{match[1].strip('+')}{match[2]}", number)
