"""The left half of the line with its real parts: tiny models, hf sampler, reward workers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from builders import config

from rlkd.algorithms import KDRL
from rlkd.rollout.loader import RolloutLoader, check_versions
from rlkd.student import load_causal_lm


def opened(*overrides, version=0):
    settings = config("rollout.prompts=4", "log.rollouts_every=0", *overrides)
    loader = RolloutLoader(settings, KDRL(settings))
    loader.open()
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    loader.policy.publish(hf.state_dict(), version)
    return loader


@pytest.fixture(autouse=True)
def tests_on_the_path(monkeypatch):
    """Reward workers import the user's module from where Python looks."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture(scope="module")
def loader():
    made = opened(version=3)
    yield made
    made.close()


def tensors(batch):
    return {f.name: v for f in dataclasses.fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}


def test_a_batch_is_a_function_of_the_iteration(loader):
    again = opened(version=3)
    for a, b in zip(tensors(loader.batch(3)).items(), tensors(again.batch(3)).items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1].nan_to_num(), b[1].nan_to_num()), a[0]
    again.close()


def test_rows_are_groups_in_the_order_of_the_prompts(loader):
    batch = loader.batch(3)
    prompts = loader.prompts.take(3, 4)
    assert len(batch) == 16 and batch.weight_version.tolist() == [3] * 16
    for row in range(16):
        ids = prompts[row // 4].token_ids
        assert tuple(batch.input_ids[row, : len(ids)].tolist()) == ids


def test_rewards_compare_with_the_answer(loader):
    batch = loader.batch(3)
    prompts = loader.prompts.take(3, 4)
    for row in range(16):
        prompt = prompts[row // 4]
        completion = batch.input_ids[row][batch.completion_mask[row]]
        text = loader.tokenizer.decode(completion, skip_special_tokens=True)
        assert batch.rewards[row].item() == float(text == prompt.answer)


def test_an_old_version_is_an_error_unless_staleness_is_allowed(loader):
    with pytest.raises(
        RuntimeError, match="iteration 5 wants samples by weight version 4, but the sampler used version 3"
    ):
        loader.batch(4)
    groups = loader.algorithm.rollout(loader.prompts.take(0, 1), loader.policy, None, 0)
    check_versions(groups, 5, max_staleness=2)
    with pytest.raises(RuntimeError, match="max_staleness is 2"):
        check_versions(groups, 6, max_staleness=2)


def test_lightning_sees_a_sized_loader_whose_state_is_the_iteration(loader):
    assert len(loader) >= 10**9
    assert loader.state_dict() == {"iteration": 0}
    other = RolloutLoader(loader.config, loader.algorithm)
    other.load_state_dict({"iteration": 17})
    assert other.state_dict() == {"iteration": 17}


def test_too_many_failed_rewards_stop_the_run():
    made = opened("reward.functions=[{name: 'reward_that_raises:on_every_completion'}]")
    with pytest.raises(RuntimeError, match=r"16 of 16 rewards failed.*max_error_rate = 0.1; most often: .*no disk"):
        made.batch(0)
    made.close()


def test_a_few_failed_rewards_are_counted_and_masked():
    made = opened("reward.functions=[{name: 'reward_that_raises:on_some_completions'}]", "reward.max_error_rate=1.0")
    batch = made.batch(0)
    made.close()
    failed = batch.rewards.isnan()
    assert 0 < failed.sum() < 16
    assert batch.metrics.reduce()["reward/errors"] == failed.sum()
    assert torch.equal(batch.completion_mask.any(1), ~failed)


def test_rollouts_are_dumped_as_they_were_trained_on(tmp_path):
    made = opened("log.rollouts_every=2", f"run.dir={tmp_path}", "run.name=x", version=0)
    batch = made.batch(0)
    made.close()
    (file,) = (tmp_path / "x" / "rollouts").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["reward"] for line in lines] == batch.rewards.tolist()
    assert lines[5]["token_ids"] == batch.input_ids[5][batch.completion_mask[5]].tolist()
