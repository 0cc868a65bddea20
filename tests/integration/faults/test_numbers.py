"""Losses, gradients and weights that are not finite."""

import dataclasses
import math

import pytest
import torch
from builders import Captured, config, groups
from run_results import rows_so_far, saved, wait_for_rows
from runs import ENV, arguments, start, train

from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.registry import ALGORITHMS
from rlkd.config_file import load_stages
from rlkd.distributed import RunStopped
from rlkd.pipeline.collate import collate
from rlkd.run.fit import run
from rlkd.storage.run_folder import checkpoints
from rlkd.training.module import PolicyModule


@pytest.fixture(scope="module")
def bad():
    batch = collate(groups(KDRL(config())), 0)
    return dataclasses.replace(batch, advantages=torch.full_like(batch.advantages, math.inf))


def test_an_update_without_a_finite_gradient_is_skipped_and_counted(bad):
    skipped = Captured(config(), bad)
    assert skipped.row["updates/skipped"] == 1
    assert "grad_norm" not in skipped.row
    never = Captured(config("optim.lr=1.0e-30"))
    assert never.row["updates/skipped"] == 0
    for name, value in never.parameters.items():
        assert torch.equal(skipped.parameters[name], value), name


def test_too_many_of_them_stop_the_run(bad):
    with pytest.raises(RunStopped, match="of iteration 1 is nan: 1 of the last 1 updates had no finite gradient") as e:
        Captured(config("optim.max_skipped=0"), bad)
    assert "optim.max_skipped = 0" in str(e.value)


def small(folder, *overrides):
    args = arguments(1, folder, "run.iterations=4", "checkpoint.every=1", "checkpoint.keep=9", *overrides)
    (stage,) = load_stages([args[1]], args[2:])
    return stage.loaded


@pytest.mark.long
def test_a_run_continues_after_a_loss_that_is_nan(tmp_path, monkeypatch):
    class OnceNan(KDRL):
        def loss(self, output, batch, iteration):
            loss = super().loss(output, batch, iteration)
            return dataclasses.replace(loss, total=loss.total * (math.nan if iteration == 1 else 1.0))

    monkeypatch.setitem(ALGORITHMS, "kdrl", OnceNan)
    loaded = small(tmp_path / "run")
    run(loaded.config, loaded.text)
    assert [row["updates/skipped"] for row in rows_so_far(tmp_path / "run")] == [0, 1, 1, 1]
    assert [row["loss"] is None for row in rows_so_far(tmp_path / "run")] == [False, True, False, False]
    before, after, last = (saved(tmp_path / "run", done) for done in (1, 2, 4))
    assert all(torch.equal(before[name], after[name]) for name in before), "the complete update was skipped"
    assert any(not torch.equal(after[name], last[name]) for name in after)
    assert all(value.isfinite().all() for value in last.values())


REWARD = """
import pathlib

def right(completion, *, answer, prompt, meta):
    if answer == "held out" and pathlib.Path(__file__).with_name("armed").exists():
        raise OSError("no disk")
    return float(completion[:1] == answer[:1])
"""


@pytest.mark.process
def test_a_run_that_stops_in_an_evaluation_keeps_the_iteration_before_it(tmp_path):
    """Its row in the log is kept too: the resumed run has one for every iteration."""
    (tmp_path / "reward_of_test.py").write_text(REWARD)
    (tmp_path / "held.jsonl").write_text('{"prompt": "reverse: ab", "answer": "held out"}\n')
    settings = (
        "eval.every=1",
        f"eval.path={tmp_path / 'held.jsonl'}",
        "reward.functions=[{name: 'reward_of_test:right'}]",
    )
    folder, env = tmp_path / "run", ENV | {"PYTHONPATH": str(tmp_path)}
    stopped = start(arguments(1, folder, "run.iterations=9999", "checkpoint.every=0", *settings), tmp_path, env)
    try:
        wait_for_rows(stopped, folder, 3)
        (tmp_path / "armed").touch()
        assert stopped.wait(60) == 1
    finally:
        stopped.kill()
    assert "stopped: evaluation: " in stopped.err.read_text() and "no disk" in stopped.err.read_text()
    (checkpoint,) = checkpoints(folder)
    done = int(checkpoint.name.split("-")[1])
    assert rows_so_far(folder)[-1]["iteration"] == done and "eval/greedy" not in rows_so_far(folder)[-1]
    (tmp_path / "armed").unlink()
    train(arguments(1, folder, f"run.iterations={done + 1}", "run.resume=auto", *settings), tmp_path, env)
    assert [row["iteration"] for row in rows_so_far(folder)] == list(range(done + 2))


@pytest.mark.long
def test_broken_weights_are_neither_published_nor_saved(tmp_path, monkeypatch):
    update = PolicyModule._update

    def breaks(self, batch, *rest):
        update(self, batch, *rest)
        if batch.iteration == 1:
            with torch.no_grad():
                self.model.hf.model.norm.weight.fill_(math.nan)

    monkeypatch.setattr(PolicyModule, "_update", breaks)
    loaded = small(tmp_path / "run")
    with pytest.raises(
        RunStopped, match=r"iteration 2: expected finite weights, got inf or NaN in model\.norm\.weight"
    ):
        run(loaded.config, loaded.text)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["iteration-000001"]
    assert [row["iteration"] for row in rows_so_far(tmp_path / "run")] == [1]
