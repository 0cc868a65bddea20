"""The rollout loader with real parts: tiny models, hf sampler, reward workers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import config, rolled

from rlkd.algorithms import feedback
from rlkd.algorithms.feedback_options import FeedbackConfig
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.opd import OPD
from rlkd.algorithms.sdpo import SDPO
from rlkd.builtin import resolve
from rlkd.data.chat import load_tokenizer
from rlkd.models.student import load_causal_lm
from rlkd.models.weights import Whole
from rlkd.pipeline.line import check_versions
from rlkd.pipeline.loader import RolloutLoader
from rlkd.types import written

CHATS = (
    (("system", "be brief"), ("user", "ab")),
    (("user", "ab"), ("assistant", "cd"), ("user", "ef")),
)


def opened(*overrides, version=0, algorithm=KDRL):
    settings = config("rollout.prompts=4", "log.rollouts_every=0", *overrides)
    loader = RolloutLoader(settings, algorithm(settings))
    loader.open()
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    loader.policy.publish(Whole(hf.state_dict()), version)
    return loader


@pytest.fixture(autouse=True)
def tests_on_the_path(monkeypatch):
    """Put the user's module where reward workers can import it."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


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
    prompts = loader.line.prompts.take(3, 4)
    assert len(batch) == 16 and batch.weight_version.tolist() == [3] * 16
    for row in range(16):
        ids = prompts[row // 4].token_ids
        assert tuple(batch.input_ids[row, : len(ids)].tolist()) == ids


def test_rewards_compare_with_the_answer(loader):
    batch = loader.batch(3)
    prompts = loader.line.prompts.take(3, 4)
    for row in range(16):
        prompt = prompts[row // 4]
        completion = batch.input_ids[row][batch.completion_mask[row]]
        text = loader.tokenizer.decode(completion).removesuffix("<eos>")
        assert batch.rewards[row].item() == float(text == prompt.answer)


def test_an_old_version_is_an_error_unless_staleness_is_allowed(loader):
    with pytest.raises(RuntimeError, match="iteration 5: expected samples of weight version 4 .*, got version 3"):
        loader.batch(4)
    (group,) = rolled(loader.algorithm, loader.line.prompts.take(0, 1), loader.policy)
    check_versions(group, 5, max_staleness=2)
    with pytest.raises(RuntimeError, match="max_staleness is 2"):
        check_versions(group, 6, max_staleness=2)


def test_joining_waits_until_the_iteration_that_is_sampled_ahead_has_all_its_completions():
    """Otherwise a publish would change the weights below the sampler."""
    made = opened("rollout.max_staleness=1", "rollout.max_tokens=64")
    made.batch(0)
    assert len(made.line.sampled_ahead(1)) < 4, "otherwise there is nothing to wait for"
    made.join()
    ahead = made.line.sampled_ahead(1)
    made.close()
    assert sorted(ahead) == [(1, index) for index in range(4)]


def test_the_state_of_a_loader_is_its_iteration(loader):
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


SOME = "reward.functions=[{name: 'reward_that_raises:on_some_completions'}]"


def test_a_failed_reward_takes_no_completion_from_a_distillation_that_asks_for_none():
    made = opened("algorithm={name: opd, group_size: 4}", SOME, "reward.max_error_rate=0.0", algorithm=OPD)
    batch = made.batch(0)
    made.close()
    assert 0 < batch.rewards.isnan().sum() < 16
    assert batch.metrics.reduce()["reward/errors"] == batch.rewards.isnan().sum()
    assert batch.completion_mask.any(1).all() and torch.equal(batch.masks["kd"], batch.completion_mask)


def test_failed_rewards_stop_a_distillation_that_needs_them():
    context = "context: {template: '{prompt}{context}', sibling: ' {text}'}"
    options = (f"algorithm={{name: sdpo, group_size: 4, {context}}}", "teacher={backend: self}")
    every = "reward.functions=[{name: 'reward_that_raises:on_every_completion'}]"
    made = opened(*options, every, algorithm=SDPO)
    with pytest.raises(RuntimeError, match="16 of 16 rewards failed"):
        made.batch(0)
    made.close()


def test_rollouts_are_dumped_as_they_were_trained_on(tmp_path):
    made = opened("log.rollouts_every=2", f"run.dir={tmp_path}", "run.name=x", version=0)
    batch = made.batch(0)
    made.close()
    (file,) = (tmp_path / "x" / "rollouts").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["reward"] for line in lines] == batch.rewards.tolist()
    assert lines[5]["token_ids"] == batch.input_ids[5][batch.completion_mask[5]].tolist()


ROUNDS = ("algorithm={name: grpo, group_size: 4, resample_rounds: 3}", "teacher=null")


class Picky(GRPO):
    """Only groups of some prompts carry a gradient."""

    wanted: frozenset[str] = frozenset()

    def has_gradient(self, group, iteration):
        return group[0].rollout.prompt.id in self.wanted


@pytest.fixture(scope="module")
def picky():
    made = opened(*ROUNDS, algorithm=Picky, version=2)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("wanted", "chosen", "drawn"),
    [
        ((0, 1, 2, 3, 4), (0, 1, 2, 3), 4),  # enough in the first round: no second one
        ((1, 3, 5, 6, 7), (1, 3, 5, 6), 8),
        ((2, 9), (0, 1, 2, 9), 12),  # too few: filled up, in the order of the prompts
        ((), (0, 1, 2, 3), 12),
    ],
)
def test_dynamic_sampling_draws_until_enough_groups_carry_a_gradient(picky, wanted, chosen, drawn):
    owned = [p for block in range(3) for p in picky.line.prompts.take(2, 4, block=block, blocks=3)]
    picky.algorithm.wanted = frozenset(owned[i].id for i in wanted)
    walked = picky.walk(2)
    assert [g[0].rollout.prompt.id for g in walked.drawn] == [p.id for p in owned[:drawn]]
    assert [g[0].rollout.prompt.id for g in walked.trained] == [owned[i].id for i in chosen]
    row = walked.meter.reduce()
    assert row["prompts/drawn"] == drawn
    assert row["groups/no_gradient"] == pytest.approx(1 - sum(i < drawn for i in wanted) / drawn)


def test_metrics_and_errors_are_those_of_all_sampled_rollouts(picky):
    picky.algorithm.wanted = frozenset()
    batch = picky.batch(2)
    walked = picky.walk(2)
    drawn = walked.drawn
    assert (len(batch), len(drawn), len(walked.trained)) == (16, 12, 4)
    row = batch.metrics.reduce()
    assert row["tokens/generated"] == sum(len(s.rollout.token_ids) for group in drawn for s in group)
    assert row["reward/mean"] == pytest.approx(sum(s.reward for group in drawn for s in group) / 48)


@pytest.mark.long
def test_dynamic_sampling_trains_on_what_has_a_gradient_and_repeats_itself():
    """With real rewards. A second loader that starts at iteration 3 gives the same batches."""
    made, resumed = opened(*ROUNDS, algorithm=GRPO), opened(*ROUNDS, algorithm=GRPO, version=3)
    for iteration in range(4):
        made.policy.publish(Whole({**made.policy._model.state_dict()}), iteration)
        batch = made.batch(iteration)
        row = batch.metrics.reduce()
        carrying = round(row["prompts/drawn"] * (1 - row["groups/no_gradient"]))
        trained = int((batch.advantages.view(4, -1) != 0).any(1).sum())
        assert trained == min(carrying, 4)
        assert trained == 4 or row["prompts/drawn"] == 12
    again = resumed.batch(3)
    for a, b in zip(tensors(batch).items(), tensors(again).items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1].nan_to_num(), b[1].nan_to_num()), a[0]
    for part in (made, resumed):
        part.close()


def test_the_teacher_scores_only_what_is_trained_on():
    made = opened("algorithm={name: kdrl, group_size: 4, resample_rounds: 3, kd: {coef: 0}}")
    walked = made.walk(0)
    drawn, groups = walked.drawn, walked.trained
    assert len(drawn) > 4, "else nothing was left out"
    assert all(s.teacher is None for group in drawn for s in group)
    assert all(s.teacher is not None for group in groups for s in group)
    made.close()


def test_a_group_that_the_teacher_can_teach_is_never_resampled():
    made = opened("algorithm={name: kdrl, group_size: 4, resample_rounds: 3, kd: {coef: 0.1}}")
    walked = made.walk(0)
    made.close()
    groups = walked.trained
    assert len(walked.drawn) == len(groups) == 4
    assert any(all(s.advantage == 0 for s in group) for group in groups), "else it would not have been in question"
    assert all(all(s.masks["kd"]) for group in groups for s in group)


@pytest.fixture
def special_letters(tmp_path):
    """The student's folder with a tokenizer in which letters and the role markers are special tokens."""
    folder = tmp_path / "special_letters"
    shutil.copytree(resolve("builtin:student"), folder)
    tokenizer = load_tokenizer(str(folder))
    names = ["<system>", "<user>", "<assistant>", "a", "e"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reward_sees_special_tokens_but_for_the_end_token_that_stopped(special_letters):
    settings = config(f"model.path={special_letters}", "rollout.prompts=4", "log.rollouts_every=0")
    loader = RolloutLoader(settings, KDRL(settings))
    loader.line.rewards.open()
    prompt = dataclasses.replace(loader.line.prompts.take(0, 4)[0], answer="<user>area")
    eos = loader.tokenizer.eos_token_id
    ids = loader.tokenizer.encode("<user>area", add_special_tokens=False)
    assert set(ids) & set(loader.tokenizer.all_special_ids), "otherwise nothing is tested"
    stopped, cut = written(prompt, [*ids, eos], "data", "stop"), written(prompt, ids, "data", "length")
    twice = written(prompt, [*ids, eos, eos], "data", "stop")
    try:
        (group,) = loader.line.stream.run([loader.line.reward([stopped, cut, twice])])
    finally:
        loader.close()
    assert [s.reward for s in group] == [1.0, 1.0, 0.0]
    assert [loader.algorithm.text(s.rollout) for s in group] == ["<user>area", "<user>area", "<user>area<eos>"]
    asked = feedback.question_ids(FeedbackConfig(behaviours=[], system=None), loader.tokenizer, stopped)
    # As text (this tokenizer has no "<") and not as the token, which would open a turn.
    assert "esponse:\n<unk>user<unk>area<assistant>" in loader.tokenizer.decode(asked)


def test_a_reward_gets_the_users_last_message_and_all_messages(tmp_path, monkeypatch):
    (tmp_path / "chat_rewards_x.py").write_text(
        "def seen(completion, *, answer, prompt, messages, meta):\n"
        "    return 1.0, prompt + '|' + ' '.join(m['role'] + ':' + m['content'] for m in messages)\n"
    )
    rows = [{"prompt": [{"role": r, "content": c} for r, c in chat], "answer": "x"} for chat in CHATS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = config(
        *(f"data.path={tmp_path / 'data.jsonl'}", "rollout.prompts=2", "log.rollouts_every=0"),
        "reward.functions=[{name: 'chat_rewards_x:seen'}]",
    )
    loader = RolloutLoader(settings, KDRL(settings))
    loader.line.rewards.open()
    try:
        prompts = loader.line.prompts.take(0, 2)
        made = [[written(prompt, [5], "data", "length")] for prompt in prompts]
        groups = loader.line.stream.run([loader.line.reward(group) for group in made])
    finally:
        loader.close()
    assert sorted(s.feedback for (s,) in groups) == ["ab|system:be brief user:ab", "ef|user:ab assistant:cd user:ef"]
