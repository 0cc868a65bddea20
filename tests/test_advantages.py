import pytest

from rlkd.advantages import group_relative


def test_mean_and_deviation_by_hand():
    # mean 0.25, deviation with n − 1: 0.5
    values = group_relative([1.0, 0.0, 0.0, 0.0], normalise=True)
    assert values == pytest.approx([0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001])


def test_mean_only_leaves_the_scale():
    assert group_relative([3.0, 1.0], normalise=False) == [1.0, -1.0]


def test_equal_rewards_give_exactly_zero():
    assert group_relative([0.1] * 7, normalise=True) == [0.0] * 7


def test_failed_rewards_take_no_part():
    assert group_relative([1.0, None, 0.0], normalise=False) == [0.5, 0.0, -0.5]
    assert group_relative([1.0, None], normalise=True) == [0.0, 0.0]


def test_adding_a_constant_changes_nothing():
    rewards = [0.0, 2.0, 1.0]
    assert group_relative(rewards, True) == pytest.approx(group_relative([r + 4.0 for r in rewards], True))
