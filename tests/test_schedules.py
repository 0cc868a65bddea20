import pytest
from pydantic import TypeAdapter

from rlkd.schedules import Schedule

schedule = TypeAdapter(Schedule).validate_python


def test_a_number_is_a_constant():
    assert [schedule(2e-3)(t) for t in (0, 10**6)] == [2e-3, 2e-3]


@pytest.mark.parametrize(("step", "beta"), [(0, 5e-3), (40, 3e-3), (80, 1e-3), (280, 1e-3)])
def test_kdrl_annealing_of_the_paper(step, beta):
    """arXiv 2506.02208, §3.3: max(5e-3 − 5e-5·t, 1e-3)."""
    assert schedule({"kind": "linear", "start": 5e-3, "end": 1e-3, "over": 80})(step) == pytest.approx(beta)


def test_cosine_starts_flat_and_ends_at_the_end():
    f = schedule({"kind": "cosine", "start": 1.0, "end": 0.0, "over": 10})
    assert (f(0), f(10), f(99)) == (1.0, 0.0, 0.0)
    assert f(5) == pytest.approx(0.5)
    assert f(0) - f(1) < f(4) - f(5)


def test_step_switches_hard():
    f = schedule({"kind": "step", "start": 1.0, "end": 0.0, "at": 3})
    assert [f(t) for t in range(5)] == [1.0, 1.0, 1.0, 0.0, 0.0]
