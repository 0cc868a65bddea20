"""Metrics over ranks: sums before quotients, under the same names everywhere."""

import json

import pytest
from runs import run_code

TWO_RANKS = """
import json, sys
import torch.distributed as dist
from rlkd.distributed import RunStopped
from rlkd.metrics import MetricAccumulator

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)


def reduced(*others):
    meter = MetricAccumulator()
    meter.mean("reward/mean", total=1.0 + 2 * rank, count=1.0 + rank)
    meter.mean("of/none", 0.0, 0.0)
    meter.total("tokens", 10.0 + rank)
    meter.maximum("slowest", -1.0 - rank)
    for kind, name in others:
        getattr(meter, kind)(name, 1.0)
    try:
        return meter.reduce()
    except RunStopped as stopped:
        return str(stopped)


print(json.dumps([
    reduced(),
    reduced(("total", "x/b" if rank else "x/a")),
    reduced(*[("total", "x/a")] * rank),
    reduced(("total" if rank else "maximum", "x/a")),
    reduced(),
]))
"""


@pytest.mark.process
def test_ranks_with_other_names_are_told_which(tmp_path):
    """Otherwise values would be mixed up when summed by position, or one rank would wait forever."""
    said = [json.loads(output) for output in run_code(TWO_RANKS, tmp_path, tmp_path / "meet")]
    assert said[0] == said[1]
    equal, other, fewer, kind, again = said[0]
    assert equal == again == {"reward/mean": 4 / 3, "tokens": 21.0, "slowest": -1.0}
    assert "total x/a is missing on rank 1; total x/b is missing on rank 0" in other
    assert "total x/a is missing on rank 0" in fewer and "x/b" not in fewer and "reward/mean" not in fewer
    assert "maximum x/a is missing on rank 1; total x/a is missing on rank 0" in kind
