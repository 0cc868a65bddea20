"""Sampler and trainer are compared in every iteration, with the tightest bound after the first weight change."""

import pytest
import torch
from builders import GRPO, config

from rlkd.algorithms import GRPO as GRPOModule
from rlkd.distributed import RunStopped
from rlkd.metrics import MetricAccumulator
from rlkd.training.module import check_mismatch, read


def measured(gap):
    meter = MetricAccumulator()
    meter.mean("mismatch/mean", gap, 1.0)
    return meter


NOISE = 1e-6
"""The gap of the iterations before; with changed weights, it does not count."""


@pytest.mark.parametrize(
    ("at_start", "gap", "bound"),
    [
        (1e-6, 0.004, None),  # fp32: a tenth of max_mismatch
        (1e-6, 0.01, "0.005, the bound for the first changed weights (it was 1e-06 before)"),
        (0.006, 0.02, None),  # bf16: four times the previous mismatch
        (0.006, 0.025, "0.024, the bound for the first changed weights (it was 0.006 before)"),
        (0.02, 0.045, None),  # never wider than max_mismatch
        (0.02, 0.06, "rollout.max_mismatch = 0.05"),
        (1e-6, float("nan"), "0.005, the bound"),
    ],
)
def test_the_bound_when_weights_have_first_changed(at_start, gap, bound):
    settings = config("rollout.max_mismatch=0.05")
    if bound is None:
        assert check_mismatch(measured(gap), settings, 1, [NOISE] * 9, at_start) == gap
    else:
        with pytest.raises(RunStopped) as caught:
            check_mismatch(measured(gap), settings, 1, [NOISE] * 9, at_start)
        assert f"more than {bound}" in str(caught.value)


START, BETWEEN, MAX = 1e-6, 0.01, 0.05
"""Gaps: of the start weights; above the bound for changed weights (0.005) and below max_mismatch; max_mismatch."""
STEP, NO_STEP, NO_RATE = ({"lr": lr, "grad_norm": norm} for lr, norm in ((1e-3, 0.5), (1e-3, 0.0), (0.0, 0.5)))
"""Figures of the iteration before: weights moved; the only update was skipped or had no gradient; a warm-up's start."""


@pytest.mark.parametrize(
    ("recent", "gap", "why"),
    [
        ([], 0.049, None),
        ([], 0.051, "by 0.051 nats a token on average, more than rollout.max_mismatch = 0.05;"),  # alone: at once
        ([], 0.9, "by 0.9 nats a token on average, more than rollout.max_mismatch = 0.05;"),
        ([], float("nan"), "by nan nats a token on average, more than rollout.max_mismatch = 0.05;"),
        ([0.035] * 9, 0.18, None),  # a bf16 run: one noisy batch, mean 0.0495
        ([0.04] * 9, 0.15, "by 0.051 nats a token on average over the last 10 iterations, more than rollout.max_"),
        ([0.04], 0.061, "by 0.0505 nats a token on average over the last 2 iterations, more than rollout.max_"),
        ([0.035] * 9, 0.21, "by 0.21 nats a token on average, more than 0.2, the bound for one iteration (4 times "),
        ([1e-6] * 9, 0.21, "by 0.21 nats a token on average, more than 0.2, the bound for one iteration (4 times "),
        ([1e-6] * 9, float("nan"), "by nan nats"),
        ([0.9] * 5 + [0.03] * 9, 0.03, None),  # only the last 10 count
    ],
)
def test_a_noisy_batch_is_forgiven_and_a_trend_is_not(recent, gap, why):
    settings = config("rollout.max_mismatch=0.05")
    if why is None:
        assert check_mismatch(measured(gap), settings, 1, recent) == gap
    else:
        with pytest.raises(RunStopped, match="^iteration 2: sampler and trainer disagree ") as caught:
            check_mismatch(measured(gap), settings, 1, recent)
        assert why in str(caught.value)


def module(backend="vllm"):
    served = ("rollout.server.launch=true",) if backend == "vllm" else ()
    return GRPOModule(config(*GRPO, f"rollout.backend={backend}", *served, f"rollout.max_mismatch={MAX}"))


def passes(algorithm, gap, before=None):
    """Whether the next iteration, after one with the figures `before`, may differ by `gap`."""
    algorithm.row = before or {}
    try:
        algorithm._check_gap(measured(gap), 1)
    except RunStopped as stopped:
        assert "the bound for the first changed weights" in str(stopped), stopped
        return False
    return True


@pytest.mark.parametrize(
    ("backend", "before", "narrow"),
    [
        ("vllm", STEP, True),
        ("vllm", NO_STEP, False),
        ("vllm", NO_RATE, False),
        ("hf", STEP, False),  # in this process a strict load takes over all weights or fails
    ],
)
def test_the_narrow_bound_is_of_weights_that_a_step_has_changed_at_a_server(backend, before, narrow):
    algorithm = module(backend)
    assert passes(algorithm, BETWEEN), "the start weights have max_mismatch alone"
    algorithm = module(backend)
    assert passes(algorithm, START)
    assert passes(algorithm, BETWEEN, before) != narrow


def test_the_narrow_bound_waits_for_the_first_step_and_is_of_one_iteration():
    algorithm = module()
    assert passes(algorithm, START)
    assert passes(algorithm, BETWEEN, NO_RATE) and passes(algorithm, BETWEEN, NO_STEP)
    assert not passes(algorithm, BETWEEN, STEP)
    algorithm = module()
    assert passes(algorithm, START) and passes(algorithm, START, NO_RATE) and passes(algorithm, START, STEP)
    assert passes(algorithm, BETWEEN, STEP), "it grows later, as numbers drift"


def test_an_iteration_without_a_token_of_the_student_is_not_the_first():
    algorithm = module()
    algorithm._check_gap(MetricAccumulator(), 0)
    assert passes(algorithm, START, STEP)
    assert not passes(algorithm, BETWEEN, STEP)


@pytest.mark.parametrize(("gaps", "narrow"), [([], False), ([START], True), ([START, START], False)])
def test_a_resumed_run_remembers_which_bound_is_due(gaps, narrow):
    algorithm, resumed = module(), module()
    for gap in gaps:
        assert passes(algorithm, gap, STEP)
    checkpoint = {}
    algorithm.on_save_checkpoint(checkpoint)
    resumed.on_load_checkpoint(checkpoint)
    assert passes(resumed, BETWEEN, STEP) != narrow


def test_a_resumed_run_stops_where_the_straight_one_does():
    """A mismatch that rises until its mean is above the bound, and a stop after each iteration."""

    def stops_at(first, algorithm):
        for iteration in range(first, 30):
            algorithm.row = STEP
            try:
                algorithm._check_gap(measured(0.008 * (iteration + 1) if iteration > 1 else 0.008), iteration)
            except RunStopped as stopped:
                assert "over the last 10 iterations" in str(stopped)
                return iteration
            checkpoint = {}
            algorithm.on_save_checkpoint(checkpoint)
            checkpoints.append(checkpoint)

    checkpoints = []
    straight = stops_at(0, module())
    assert straight == len(checkpoints) > 9
    for iteration, checkpoint in enumerate(list(checkpoints)):
        resumed = module()
        resumed.on_load_checkpoint(checkpoint)
        assert stops_at(iteration + 1, resumed) == straight


def test_a_checkpoint_from_before_there_were_gaps_is_read():
    algorithm = module()
    algorithm.on_load_checkpoint({"skipped": []})
    assert passes(algorithm, BETWEEN, STEP)


def test_a_metric_of_the_loss_is_one_number():
    """Also a plain number, or a tensor with one element: algorithms of users have both."""
    loss = torch.tensor(0.5)
    assert read([{"loss": loss, "a": 2.0, "b": torch.tensor([3.0])}]) == [("loss", 0.5), ("a", 2.0), ("b", 3.0)]
    with pytest.raises(ValueError, match=r"^metric c of the loss: expected one number, got a tensor of shape \[2\]$"):
        read([{"loss": loss, "c": torch.zeros(2)}])
