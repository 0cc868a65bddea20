"""Sampler and trainer are compared in every iteration, with the tightest bound after the first weight change."""

import pytest
from builders import config

from rlkd.distributed import RunStopped
from rlkd.metrics import Meter
from rlkd.training.module import check_mismatch


def measured(gap):
    meter = Meter()
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
