import itertools
import math

import pytest

from rlkd.algorithms.advantages import group_relative, leave_one_out, overlong_penalty


def test_mean_and_deviation_by_hand():
    # mean 0.25, deviation with n − 1: 0.5
    values = group_relative([1.0, 0.0, 0.0, 0.0], normalise=True)
    assert values == pytest.approx([0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001])


def test_mean_only_leaves_the_scale():
    assert group_relative([3.0, 1.0], normalise=False) == [1.0, -1.0]


@pytest.mark.parametrize("size", range(2, 100))
def test_equal_rewards_give_exactly_zero(size):
    """Even if the mean of equal numbers is rounded, since dynamic sampling checks for != 0."""
    for reward in (0.1, 1 / 3, 0.7 + 1e-16, -0.9):
        assert group_relative([reward] * size, normalise=True) == [0.0] * size
        assert leave_one_out([reward] * size) == [0.0] * size


def test_failed_rewards_take_no_part():
    assert group_relative([1.0, None, 0.0], normalise=False) == [0.5, 0.0, -0.5]
    assert group_relative([1.0, None], normalise=True) == [0.0, 0.0]
    assert leave_one_out([1.0, None, 0.0]) == [1.0, 0.0, -1.0]
    assert leave_one_out([1.0, None]) == [0.0, 0.0]


def test_adding_a_constant_changes_nothing():
    rewards = [0.0, 2.0, 1.0]
    assert group_relative(rewards, True) == pytest.approx(group_relative([r + 4.0 for r in rewards], True))


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = [1.0, 0.0, 0.25, 3.0]
    by_hand = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert leave_one_out(rewards) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("credit", "share"), [(leave_one_out, 1.0), (lambda rewards: group_relative(rewards, False), 2 / 3)]
)
def test_only_leave_one_out_expects_the_true_gradient(credit, share):
    """Two actions, the second of them worth 1, of probability p = σ(θ): dE[r]/dθ = p(1 − p). Groups of three."""
    p, n = 0.3, 3
    expected = 0.0
    for actions in itertools.product((0, 1), repeat=n):
        probability = math.prod(p if a else 1 - p for a in actions)
        slopes = [a - p for a in actions]  # d log π(a) / dθ
        values = credit([float(a) for a in actions])
        expected += probability * sum(a * s for a, s in zip(values, slopes, strict=True)) / n
    assert expected == pytest.approx(share * p * (1 - p), abs=1e-12)


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0)])
def test_the_overlong_penalty_is_linear(length, penalty):
    """arXiv 2503.14476, Eq. 13 at L_max = 100, L_cache = 20."""
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)


def test_without_a_cache_no_length_is_punished():
    assert [overlong_penalty(length, 100, 0) for length in (1, 99, 100)] == [0.0] * 3
