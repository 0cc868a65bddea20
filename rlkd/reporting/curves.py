"""A metric over the iterations of a run as a few hundred points, however long the run is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Point = tuple[int, float | None]
"""(iteration, value). None is a gap in the curve, for null, NaN or an infinity."""

MOST = 600
"""Points of a curve on the page."""
MEANS = 150
"""Points of its running mean."""
_WINDOW = 10  # points of the running mean; of long runs a fiftieth of their points
_HUGE = 1e300  # beyond it the arithmetic of an axis overflows
_SINGLE = 1e-6  # relative; single-precision sums of the same values in another order differ by less


def points_of(rows: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """The points of one metric. A row without the key gives no point; a row with null or NaN gives a gap."""
    return [(row["iteration"], finite(row[key])) for row in rows if key in row]


def finite(value: float | None) -> float | None:
    """`value`, or None for what JSON and axes cannot hold."""
    return float(value) if value is not None and abs(value) < _HUGE else None  # False for NaN too


def values_of(points: Iterable[Point]) -> list[float]:
    """The values of `points` without the gaps."""
    return [value for _, value in points if value is not None]


def thin(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most `most` of the points: the first, the last, and of each stretch between its lowest, highest and a gap."""
    if len(points) <= most:
        return list(points)
    kept, stretches = {0, len(points) - 1}, (most - 2) // 3
    for i in range(stretches):
        stretch = range(len(points) * i // stretches, len(points) * (i + 1) // stretches)
        known = [(value, at) for at in stretch if (value := points[at][1]) is not None]
        if known:
            kept |= {min(known)[1], max(known)[1]}
        kept |= set([at for at in stretch if points[at][1] is None][:1])
    return [points[at] for at in sorted(kept)]


def is_flat(points: Iterable[Point], rounding: float = 0.0) -> bool:
    """Whether all values are equal up to rounding; `rounding` as in `Metric`."""
    values = values_of(points)
    low, high = min(values, default=0.0), max(values, default=0.0)
    return high - low <= max(_SINGLE * max(abs(low), abs(high)), rounding)


def running_mean(points: Sequence[Point]) -> tuple[int, list[Point]]:
    """(points in the window, means of the window that ends at each of a few points); (0, []) for a short curve."""
    known = [(at, value) for at, value in points if value is not None]
    if len(known) < 5 * _WINDOW:
        return 0, []
    window, sums = max(_WINDOW, len(known) // 50), [0.0]
    for _, value in known:
        sums.append(sums[-1] + value)
    ends = sorted({round(i * (len(known) - 1) / (MEANS - 1)) for i in range(MEANS)})
    starts = [max(0, end + 1 - window) for end in ends]
    return window, [
        (known[end][0], (sums[end + 1] - sums[start]) / (end + 1 - start))
        for start, end in zip(starts, ends, strict=True)
    ]


def rounded(value: float | None, digits: int = 5) -> float | None:
    """`value` with the digits that a screen can show, which makes JSON short."""
    return None if value is None else float(f"{value:.{digits}g}")


def curve(points: Sequence[Point], smooth: bool) -> dict[str, Any]:
    """What the page draws: x, y, and with `smooth` the running mean; and the figures beside it, from all points."""
    values, shown = values_of(points), thin(points)
    window, means = running_mean(points) if smooth else (0, [])
    return {
        "x": [at for at, _ in shown],
        "y": [rounded(value) for _, value in shown],
        **({"window": window, "mean": [[at for at, _ in means], [rounded(y) for _, y in means]]} if window else {}),
        "min": rounded(min(values, default=None)),
        "max": rounded(max(values, default=None)),
        "last": rounded(points[-1][1]),
        "missing": len(points) - len(values),
    }
