"""Sampler and trainer are compared in every iteration, with the tightest bound after the first weight change."""

import pytest
from builders import GRPO, config

from rlkd.algorithms import GRPO as GRPOModule
from rlkd.distributed import RunStopped
from rlkd.metrics import MetricAccumulator
from rlkd.training.module import check_mismatch


def measured(gap):
    meter = MetricAccumulator()
    meter.mean("mismatch/mean", gap, 1.0)
    return meter


@pytest.mark.parametrize(
    ("at_start", "gap", "bound"),
    [
        (None, 0.02, None),  # not the first change: only max_mismatch
        (None, 0.06, "rollout.max_mismatch = 0.05"),
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
        assert check_mismatch(measured(gap), settings, 1, at_start) == gap
    else:
        with pytest.raises(RunStopped) as caught:
            check_mismatch(measured(gap), settings, 1, at_start)
        assert f"more than {bound}" in str(caught.value)


START, BETWEEN, MAX = 1e-6, 0.01, 0.05
"""Gaps: of the start weights; above the bound for changed weights (0.005) and below max_mismatch; max_mismatch."""
STEP, NO_STEP, NO_RATE = ({"lr": lr, "grad_norm": norm} for lr, norm in ((1e-3, 0.5), (1e-3, 0.0), (0.0, 0.5)))
"""Figures of the iteration before: weights moved; the only update was skipped or had no gradient; a warm-up's start."""


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


def test_a_checkpoint_from_before_there_were_gaps_is_read():
    algorithm = module()
    algorithm.on_load_checkpoint({"skipped": []})
    assert passes(algorithm, BETWEEN, STEP)
