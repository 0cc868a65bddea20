"""Curves of a bounded size keep what a reader must see."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkd.reporting.curves import MEANS, MOST, curve, finite, is_flat, points_of, running_mean, thin

VALUES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=61, max_size=200)


@given(VALUES, st.integers(8, 60))
def test_a_thinned_curve_keeps_its_ends_its_extremes_and_that_it_has_gaps(values, most):
    points = list(enumerate(values))
    thinned = thin(points, most)
    assert len(thinned) <= most and thinned == sorted(set(thinned), key=lambda point: point[0])
    assert set(thinned) <= set(points)
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    known, kept = [v for v in values if v is not None], [v for _, v in thinned if v is not None]
    assert (min(known, default=0), max(known, default=0)) == (min(kept, default=0), max(kept, default=0))
    assert (None in values) == any(v is None for _, v in thinned)


def test_a_short_curve_stays_as_it_is():
    points = [(i, float(i)) for i in range(MOST)]
    assert thin(points) == points


def test_a_spike_of_a_long_curve_is_drawn_where_it_is():
    points = [(i, 1000.0 if i == 7777 else math.sin(i)) for i in range(10_000)]
    drawn = curve(points, smooth=True)
    assert len(drawn["x"]) <= MOST and len(drawn["mean"][0]) <= MEANS
    assert drawn["y"][drawn["x"].index(7777)] == 1000.0 and drawn["max"] == 1000.0
    assert drawn["window"] == 200 and drawn["mean"][0][-1] == 9999


def test_the_running_mean_is_that_of_the_points_before():
    chance = random.Random(0)
    points = [(i, chance.random()) for i in range(60)]
    window, means = running_mean(points)
    assert window == 10
    for at, mean in means:
        last = [value for _, value in points[max(0, at - 9) : at + 1]]
        assert mean == pytest.approx(sum(last) / len(last))
    assert running_mean(points[:49]) == (0, []), "too short to smooth"


@pytest.mark.parametrize(
    ("values", "rounding", "flat"),
    [
        ([0.2] * 30, 0.0, True),
        ([0.2, 0.20000000298, 0.19999999] * 10, 0.0, True),  # in single precision, summed in different orders
        ([1e-9, -2e-9, 3e-10] * 10, 1e-7, True),  # zero up to rounding
        ([0.0] * 30, 0.0, True),
        ([None, None], 0.0, True),
        ([1e-9 * i for i in range(10)], 0.0, False),
        ([0.2, 0.2001], 0.0, False),
    ],
)
def test_flat_is_equal_up_to_rounding(values, rounding, flat):
    assert is_flat(list(enumerate(values)), rounding) is flat


def test_what_is_not_finite_is_a_gap_and_a_missing_value_is_none():
    rows = [{"iteration": 1, "a": math.nan}, {"iteration": 2}, {"iteration": 3, "a": 1}, {"iteration": 4, "a": None}]
    points = points_of(rows, "a")
    assert points == [(1, None), (3, 1.0), (4, None)]
    drawn = curve(points, smooth=False)
    assert drawn["missing"] == 2 and drawn["last"] is None and drawn["min"] == drawn["max"] == 1.0
    assert [finite(value) for value in (math.inf, -math.inf, 1e301, 9e299)] == [None, None, None, 9e299]
