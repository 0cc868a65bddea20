"""`rollout.max_staleness: 1` with the sampler in this process: one iteration ahead, always, and the same bits again."""

import json
import shutil

import pytest
import torch
from run_results import assert_same_run, rows
from runs import train_small

pytestmark = pytest.mark.process
AHEAD = ("rollout.max_staleness=1", "optim.lr=0.001", "rollout.max_tokens=8")
ARMS = {
    "kdrl": (),
    "dynamic_sampling": (
        *("algorithm={name: grpo, group_size: 4, resample_rounds: 3}", "teacher=null"),
        *("model.path=builtin:teacher", "rollout.temperature=0.7", "rollout.max_tokens=12"),
    ),
    "moving_teacher": (
        "teacher={backend: self, weights: ema, decay: 0.5}",
        "algorithm={name: opsd, context: {template: '{prompt}{context}', reference: ' hint: {text}'}}",
        "algorithm.divergence={clip: null}",
        "algorithm.group_size=4",
    ),
    "two_updates": ("trainer.updates_per_iteration=2",),
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_is_a_function_of_its_seed_and_resumes_bit_for_bit(arm, tmp_path):
    """Straight, and from the straight run's checkpoint of its second iteration, whose successor was sampled by then."""
    settings = (*AHEAD, *ARMS[arm])
    train_small(1, tmp_path / "straight", "run.iterations=4", "checkpoint.every=2", "checkpoint.keep=9", *settings)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "iteration-000004")
    train_small(1, tmp_path / "resumed", "run.iterations=4", "run.resume=auto", *settings)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed", 4)
    found = rows(tmp_path / "straight")
    assert [row["staleness/mean"] for row in found] == [0, 1, 1, 1]
    assert all(row["mismatch/mean"] < 1e-5 for row in found), "on completions by the newest weights"
    assert found[0]["staleness/gap"] < 1e-5 < 1e-3 < found[2]["staleness/gap"]
    ahead = json.loads((tmp_path / "straight/checkpoints/iteration-000002/sampled_ahead-rank0.json").read_text())
    assert len(ahead) >= 4 and {(iteration, index) for iteration, index, *_ in ahead} >= {(2, i) for i in range(4)}


def test_two_ranks_agree_with_one(tmp_path):
    for ranks in (1, 2):
        train_small(ranks, tmp_path / str(ranks), "run.iterations=3", *AHEAD)
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for name in ("reward/mean", "tokens/generated", "completion/length", "staleness/mean"):
            assert one[name] == pytest.approx(two[name]), name
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


def test_what_is_sampled_ahead_is_by_the_weights_before(tmp_path):
    """The second iteration has the completions that it would have had with the first one's weights."""
    train_small(1, tmp_path / "ahead", "run.iterations=2", "log.rollouts_every=1", *AHEAD)
    train_small(1, tmp_path / "still", "run.iterations=2", "log.rollouts_every=1", *AHEAD[1:], "optim.lr=0.0")

    def sampled(name):
        text = (tmp_path / name / "rollouts" / "000002-rank0.jsonl").read_text()
        return [(json.loads(line)["id"], json.loads(line)["token_ids"]) for line in text.splitlines()]

    assert sampled("ahead") == sampled("still")
    assert torch.tensor([row["loss"] for row in rows(tmp_path / "ahead")]).isfinite().all()
