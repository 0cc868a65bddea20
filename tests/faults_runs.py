"""What the faults have in common: the small run, waiting for its iterations, and telling whether two runs are one."""

import json
import time
from pathlib import Path

import torch
from test_run import saved


def rows(folder):
    """The rows of metrics.jsonl, whole lines only."""
    path = Path(folder, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_rows(run, folder, count, seconds=120):
    """Until `count` iterations are logged; `run` must live until then."""
    deadline = time.monotonic() + seconds
    while len(rows(folder)) < count:
        assert run.returncode is None and time.monotonic() < deadline, (run.returncode, run.err.read_text()[-3000:])
        time.sleep(0.01)


def assert_same_run(one, other, iteration):
    """Weights, optimizer and the figures of every iteration, bit for bit."""
    a, b = saved(one, iteration), saved(other, iteration)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    for left, right in zip(rows(one)[:iteration], rows(other)[:iteration], strict=True):
        assert left.keys() == right.keys()
        assert not [k for k in left if left[k] != right[k] and not k.startswith(("time/", "tokens_per_s", "memory/"))]
