"""Where the time of an iteration goes when its groups are in several stages at once."""

import pytest

from rlkd.pipeline import clock
from rlkd.pipeline.clock import StageClock


@pytest.fixture
def at(monkeypatch):
    """Set the time."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    return lambda moment: now.__setitem__(0, moment)


def test_a_moment_belongs_to_the_earliest_stage_that_has_a_group(at):
    made = StageClock()
    slow, fast = made.stage("rollout"), made.stage("rollout")
    slow.__enter__(), fast.__enter__()
    at(2.0)
    fast.__exit__(None, None, None)
    reward = made.stage("reward")
    reward.__enter__()
    at(5.0)
    slow.__exit__(None, None, None)
    at(6.0)
    reward.__exit__(None, None, None)
    at(8.0)
    with made.stage("teacher"):
        at(9.0)
    assert made.seconds(0.0, 10.0) == {"rollout": 5.0, "reward": 1.0, "teacher": 1.0}
    assert made.seconds(4.0, 5.5) == {"rollout": 1.0, "reward": 0.5, "teacher": 0.0}
    assert sum(made.seconds(6.0, 8.0).values()) == 0.0
    assert sum(made.seconds(20.0, 30.0).values()) == 0.0
