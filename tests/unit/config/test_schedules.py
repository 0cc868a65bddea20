import pytest
import torch
from pydantic import TypeAdapter
from transformers import get_linear_schedule_with_warmup

from rlkd.config.schedules import Schedule

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


WARM_UP_AND_DECAY = {
    "kind": "piecewise",
    "pieces": [
        {"kind": "linear", "start": 0.0, "end": 1e-6, "over": 166},
        {"kind": "linear", "start": 1e-6, "end": 0.0, "over": 1494},
    ],
}


@pytest.mark.parametrize("step", [0, 1, 83, 165, 166, 167, 913, 1659, 1660, 5000])
def test_a_warm_up_and_a_decay_are_those_of_the_hugging_face_trainer(step):
    """`get_linear_schedule_with_warmup` over 1660 steps, 10 % of them warm-up: REDI's, arXiv 2505.24850, App. C.4."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    theirs = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=166, num_training_steps=1660).lr_lambdas[0]
    assert schedule(WARM_UP_AND_DECAY)(step) == pytest.approx(1e-6 * theirs(step), abs=1e-18)


def test_pieces_follow_each_other_and_the_last_one_stays_at_its_end():
    f = schedule(
        {
            "kind": "piecewise",
            "pieces": [
                {"kind": "linear", "start": 0.0, "end": 1.0, "over": 4},
                {"kind": "linear", "start": 1.0, "end": 1.0, "over": 2},
                {"kind": "cosine", "start": 2.0, "end": 0.0, "over": 2},
            ],
        }
    )
    assert [f(t) for t in range(10)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 2.0, 1.0, 0.0, 0.0])


def test_one_piece_is_that_piece():
    piece = {"kind": "cosine", "start": 1.0, "end": 0.1, "over": 7}
    one = schedule({"kind": "piecewise", "pieces": [piece]})
    assert [one(t) for t in range(12)] == [schedule(piece)(t) for t in range(12)]
