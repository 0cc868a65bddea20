"""`--profile` and the times of a row."""

import gzip
import json

import pytest
from run_results import rows
from runs import arguments, train

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "traced"
    settings = ("run.iterations=3", "eval.every=1", "eval.prompts=8", "checkpoint.every=1")
    train([*arguments(1, folder, *settings), "--profile"], folder.parent)
    return folder


def test_the_trace_has_the_second_iteration_of_all_threads(traced):
    with gzip.open(traced / "trace-rank0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert any("AdamW.step" in name or "Optimizer.step" in name for name in names), "the trainer's thread"
    threads = {event["tid"] for event in events if event.get("cat") == "cpu_op"}
    assert len(threads) >= 2, "the models of the left half run in a thread of their own"


def test_the_times_of_a_row_add_up(traced):
    for row in rows(traced)[2:]:  # the first one includes what Lightning does before it
        parts = {n: v for n, v in row.items() if n.startswith("time/") and n not in ("time/total", "time/overhead")}
        assert sum(parts.values()) == pytest.approx(row["time/total"], rel=0.05), parts
        assert 0 <= row["time/overhead"] < row["time/total"]
        assert row["time/evaluate"] > 0
    assert rows(traced)[3]["time/checkpoint"] > 0, "that of the iteration before"
