"""Reads the results of a run, its checkpoints and metrics, and compares two runs."""

import json
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def saved(folder, iteration):
    """The tensors of a checkpoint: model and optimizer, by name."""
    whole = folder / f"whole-{iteration}.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"iteration-{iteration:06d}", whole)
    flat = {}

    def walk(value, name):
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, dict):
            for key, entry in value.items():
                walk(entry, f"{name}/{key}")

    walk(torch.load(whole, weights_only=False), "")
    assert any("exp_avg_sq" in name for name in flat) and any("lm_head" in name for name in flat)
    return flat


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_so_far(folder):
    """The rows of metrics.jsonl, without a truncated last line."""
    path = Path(folder, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_rows(run, folder, count, seconds=120):
    """Wait until `count` iterations are logged; `run` must not end before."""
    deadline = time.monotonic() + seconds
    while len(rows_so_far(folder)) < count:
        assert run.returncode is None and time.monotonic() < deadline, (run.returncode, run.err.read_text()[-3000:])
        time.sleep(0.01)


def assert_same_run(one, other, iteration):
    """Assert that weights, optimizer and the metrics of every iteration are equal bit for bit."""
    a, b = saved(one, iteration), saved(other, iteration)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    for left, right in zip(rows_so_far(one)[:iteration], rows_so_far(other)[:iteration], strict=True):
        assert left.keys() == right.keys()
        assert not [k for k in left if left[k] != right[k] and not k.startswith(("time/", "tokens_per_s", "memory/"))]
