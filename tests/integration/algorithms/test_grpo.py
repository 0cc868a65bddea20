"""Variants of GRPO: every option changes what it should and nothing else, however the work is split."""

import dataclasses

import pytest
import torch
from builders import (
    GRPO,
    LENGTHS,
    NO_CLIP,
    REWARDS,
    Captured,
    assert_moved,
    assert_same,
    config,
    groups,
    own_logprobs,
    scored,
)

from rlkd.algorithms.grpo import GRPO as GRPOModule
from rlkd.algorithms.kdrl import KDRL
from rlkd.config_file import load
from rlkd.models.logprob_head import PolicyOutput
from rlkd.models.student import load_causal_lm
from rlkd.pipeline.collate import collate
from rlkd.types import written

RELATIVES = {
    "Dr. GRPO": ("normalise=false", "reduction=dr_grpo"),
    "RLOO": ("baseline=leave_one_out", "normalise=false"),
    "DAPO": ("clip_high=0.28", "overlong_cache=10", "mask_truncated=true"),
    "GSPO": ("ratio=sequence", "reduction=sequence_mean", "clip_low=0.01", "clip_high=0.02"),
    "CISPO": ("surrogate=cispo", "ratio_cap=1.2"),
    "CISPO of sequences": ("surrogate=cispo", "ratio=sequence", "ratio_cap=1.02"),
    "dual clip": ("dual_clip=1.2",),
    "entropy bonus": ("entropy_coef=0.1",),
    "sequence importance": ("importance_level=sequence", "importance=mask"),
}


def options(name):
    return tuple(f"algorithm.{option}" for option in RELATIVES[name])


def settings_of(*overrides):
    return config(*GRPO, NO_CLIP, "rollout.max_tokens=12", *overrides)


def moved_on(settings, algorithm=GRPOModule):
    """A batch whose policy has changed since the old log-probs, so that ratios are not 1."""
    batch = collate(groups(algorithm(settings)), 0)
    own = own_logprobs(settings, batch)
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(5))
    sampler = torch.where(batch.student_mask, own - 0.2 * noise.flip(1), torch.nan)
    return dataclasses.replace(batch, old_logprobs=own - 0.3 * noise, sampler_logprobs=sampler)


@pytest.fixture(scope="module")
def plain():
    settings = settings_of()
    return Captured(settings, moved_on(settings))


@pytest.mark.parametrize("name", RELATIVES)
def test_a_variant_differs_from_grpo_but_not_by_the_split(name, plain):
    settings = settings_of(*options(name))
    whole = Captured(settings, moved_on(settings))
    split = Captured(settings_of(*options(name), "trainer.micro_batch_tokens=48"), moved_on(settings))
    assert_moved(whole)
    assert_same(whole.gradients, split.gradients, 5e-6)  # the ratios are rounded in fp32
    for figure in ("loss", "loss/pg", "clip_fraction", "entropy"):
        assert whole.row[figure] == pytest.approx(split.row[figure], rel=1e-5, abs=1e-6), figure
    apart = max(float((whole.gradients[n] - g).abs().max()) for n, g in plain.gradients.items())
    assert apart > 1e-3, "the option has no effect"


@pytest.mark.parametrize("name", RELATIVES)
def test_kdrl_with_coefficient_zero_is_every_variant_bit_for_bit(name):
    grpo, kdrl = (
        settings_of(*options(name)),
        config(NO_CLIP, "rollout.max_tokens=12", *options(name), "algorithm.kd.coef=0"),
    )
    a, b = Captured(grpo, moved_on(grpo)), Captured(kdrl, moved_on(kdrl, KDRL))
    assert_moved(a)
    assert_same(a.gradients, b.gradients, 0)
    assert_same(a.parameters, b.parameters, 0)


def test_at_ratio_one_the_ratio_options_change_nothing_and_cispo_has_the_same_gradient():
    first = Captured(settings_of())
    assert_same(first.gradients, Captured(settings_of("algorithm.ratio=sequence")).gradients, 0)
    assert_same(first.gradients, Captured(settings_of("algorithm.dual_clip=3.0")).gradients, 0)
    assert_same(first.gradients, Captured(settings_of(*options("CISPO"))).gradients, 1e-6)


def test_the_entropy_bonus_has_the_gradient_of_the_mean_entropy():
    """Through the chunked kernel, against plain autograd over the whole vocabulary."""
    settings = settings_of("algorithm.entropy_coef=0.1")
    batch = collate(groups(GRPOModule(settings), rewards=(0.0,) * 8), 0)
    captured = Captured(settings, batch)
    hf = load_causal_lm(settings.model.path, torch.float32, attention=None, trust_remote_code=False)
    logprobs = hf(batch.input_ids).logits[:, :-1].log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)[batch.completion_mask[:, 1:]].mean()
    (-0.1 * entropy).backward()
    assert captured.row["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert captured.row["loss"] == pytest.approx(-0.1 * entropy.item(), rel=1e-5)
    assert_moved(captured)
    assert_same(captured.gradients, {n: p.grad for n, p in hf.named_parameters()}, 1e-6)


def test_dr_grpo_is_the_sum_over_rewards_less_their_mean_over_the_budget():
    """arXiv 2503.20783: without standard deviation and length; compared with REINFORCE written out."""
    settings = settings_of(*options("Dr. GRPO"), "algorithm.importance=off")
    batch = collate(groups(GRPOModule(settings)), 0)
    hf = load_causal_lm(settings.model.path, torch.float32, attention=None, trust_remote_code=False)
    logprobs = hf(batch.input_ids).logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    rewards = torch.tensor(REWARDS)
    centred = (rewards.view(2, 4) - rewards.view(2, 4).mean(1, keepdim=True)).flatten()
    (-(logprobs * batch.completion_mask[:, 1:]).sum(1) * centred / (8 * 12)).sum().backward()
    captured = Captured(settings, batch)
    assert_moved(captured)
    assert_same(captured.gradients, {n: p.grad for n, p in hf.named_parameters()}, 1e-6)


def test_truncated_completions_take_no_part_in_the_comparison():
    """Rows 0 and 2 of the first group are truncated: only rewards 0 and 1 are left to compare."""
    settings = settings_of("algorithm.mask_truncated=true", "algorithm.normalise=false")
    first, second = groups(GRPOModule(settings))
    assert [s.rollout.finish_reason for s in first] == ["length", "stop", "length", "stop"]
    assert [s.advantage for s in first] == [0.0, -0.5, 0.0, 0.5]
    assert [s.reward for s in first] == list(REWARDS[:4])
    assert [s.advantage for s in second] == [0.0] * 4


def test_truncated_completions_give_no_policy_gradient_but_stay_in_the_normaliser():
    settings = settings_of("algorithm.mask_truncated=true", "algorithm.normalise=false", "algorithm.importance=off")
    batch = collate(groups(GRPOModule(settings)), 0)
    stopped = batch.rows(torch.tensor([1, 3]))
    whole, alone = Captured(settings, batch), Captured(settings, stopped)
    assert_moved(whole)
    share = (LENGTHS[1] + LENGTHS[3]) / sum(LENGTHS)
    assert_same(whole.gradients, {n: share * g for n, g in alone.gradients.items()}, 1e-6)


def test_truncation_and_length_leave_distillation_alone():
    made = ("rollout.max_tokens=12", "algorithm.kd.mask=response")
    options = ("algorithm.mask_truncated=true", "algorithm.overlong_cache=12")
    plain, changed = groups(KDRL(config(*made))), groups(KDRL(config(*made, *options)))
    pairs = [(a, b) for one, other in zip(plain, changed, strict=True) for a, b in zip(one, other, strict=True)]
    assert [a.masks["kd"] for a, _ in pairs] == [b.masks["kd"] for _, b in pairs]
    assert any(a.advantage != b.advantage for a, b in pairs)


def test_the_overlong_penalty_enters_the_comparison_but_not_the_reward():
    """12 tokens at most, the penalty begins after 8: rows of 9 and 12 tokens lose a quarter and all of it."""
    settings = settings_of("algorithm.overlong_cache=4", "algorithm.normalise=false")
    rows = [scored(i, n, r) for i, (n, r) in enumerate(zip((5, 9, 12, 8), (1.0, 1.0, 0.0, None), strict=True))]
    credited = GRPOModule(settings).advantages(rows)
    shaped = torch.tensor([1.0, 0.75, -1.0])
    assert [s.advantage for s in credited] == pytest.approx([*(shaped - shaped.mean()).tolist(), 0.0])
    assert [s.reward for s in credited] == [1.0, 1.0, 0.0, None]


def group_of(*rewards):
    return [scored(i, 5, r, scores={}) for i, r in enumerate(rewards)]


def test_a_group_carries_a_gradient_where_its_advantages_are_not_all_zero():
    algorithm = GRPOModule(config(*GRPO))
    assert algorithm.has_gradient(group_of(1.0, 0.0, 0.0), 0)
    assert not algorithm.has_gradient(group_of(0.1, 0.1, 0.1), 0)
    assert not algorithm.has_gradient(group_of(1.0, None, 1.0), 0)
    truncated = GRPOModule(config(*GRPO, "algorithm.mask_truncated=true"))
    assert not truncated.has_gradient(group_of(1.0, 0.0, 0.0), 0), "rows 0 and 2 are cut off"


PUNISHED = [
    pytest.param([(0.0, 100)] * 15 + [(0.0, 16385)], id="all wrong, one of them a token too long"),
    pytest.param([(2.0, 100)] * 15 + [(2.0, 18000)], id="all right, one of them too long"),
    pytest.param([(0.0, 100)] * 14 + [(0.0, 20480)] * 2, id="all wrong, two of them cut off"),
]


def long_group(answers):
    """A group of one prompt from (reward, tokens) of each completion."""
    prompt = scored(1, 1, 0.0).rollout.prompt
    return [scored(0, 1, reward, scores={}, rollout=written(prompt, (7,) * n, "data", "stop")) for reward, n in answers]


def dapo(*overrides):
    return GRPOModule(load(["configs/dapo.yaml"], ["model.path=m", "data.path=d", *overrides]).config)


@pytest.mark.parametrize("answers", PUNISHED)
@pytest.mark.parametrize("look_at", ["correct", "reward"])
def test_dynamic_sampling_drops_what_is_all_right_or_all_wrong_whatever_the_lengths(answers, look_at):
    """arXiv 2503.14476, Eq. 11, with the paper's lengths: the penalty acts in kept groups, but keeps no group."""
    algorithm, group = dapo(f"algorithm.filter={look_at}"), long_group(answers)
    assert not algorithm.has_gradient(group, 0)
    assert [s.advantage for s in algorithm.advantages(group)] == [0.0] * 16, "nor does it fill up a batch with them"
    other = long_group([*answers[:-1], (2.0 - answers[0][0], answers[-1][1])])
    assert algorithm.has_gradient(other, 0) and any(s.advantage for s in algorithm.advantages(other))
    assert any(dapo("algorithm.resample_rounds=1").credit(group)), "without dynamic sampling nothing is dropped"


def test_dapo_is_the_shipped_config():
    assert (dapo().options.filter, dapo().options.resample_rounds) == ("correct", 10)


@pytest.mark.parametrize(
    ("rewards", "correct", "reward"),
    [
        ((0.1, 0.0, 0.1), False, True),
        ((1.1, 1.0, 1.0), False, True),
        ((1.1, 1.0, 0.1), True, True),
        ((0.1, 0.1, None), False, False),
        ((1.0, 0.0, None), True, True),
    ],
)
def test_a_filter_uses_correctness_only(rewards, correct, reward):
    """A second reward, for example for the format, distinguishes completions, but not right from wrong ones."""
    for look_at, carries in (("correct", correct), ("reward", reward)):
        algorithm = GRPOModule(config(*GRPO, "algorithm.resample_rounds=2", f"algorithm.filter={look_at}"))
        assert algorithm.has_gradient(group_of(*rewards), 0) is carries
        assert any(s.advantage for s in algorithm.advantages(group_of(*rewards))) is carries


def test_a_measured_kl_is_that_of_the_current_policy_by_enumeration():
    """One row for each token of a vocabulary, weighted by the older policy that sampled it."""
    generator = torch.Generator().manual_seed(2)
    current, old, other = torch.randn(3, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    settings = config(*GRPO)
    batch = collate([[scored(i, 1, 0.0) for i in range(7)]], 0)
    column = torch.zeros_like(batch.advantages, dtype=torch.float64)
    spots = (torch.arange(7), batch.lengths - 1)

    def placed(values):
        return column.index_put(spots, values)

    batch = dataclasses.replace(
        batch,
        old_logprobs=placed(old),
        sampler_logprobs=placed(old),
        loss_weights={"student": placed(old.exp())},
    )
    measured = GRPOModule(settings).measured_kl(PolicyOutput(logprobs=placed(current)), placed(other), batch)
    assert float(measured) == pytest.approx(float((current.exp() * (current - other)).sum()), abs=1e-12)


@pytest.mark.parametrize(
    ("overrides", "rewards", "iteration", "carries"),
    [
        (("kd.coef=0.1",), (0.0, 0.0), 0, True),
        (("kd.coef=0.1",), (1.0, 1.0), 0, True),
        (("kd.coef=0",), (0.0, 0.0), 0, False),
        (("kd.coef=0",), (1.0, 0.0), 0, True),
        (("kd.coef=0", "policy_coef=0"), (1.0, 0.0), 0, False),
        (("kd.coef=0.1", "policy_coef=0"), (1.0, 0.0), 0, True),
        (("kd.coef=0.1", "kd.mask=response"), (1.0, 1.0), 0, False),
        (("kd.coef=0.1", "kd.mask=response"), (0.0, 0.0), 0, True),
        (("kd.coef=0.1", "kd.mask=group", "policy_coef=0"), (1.0, 0.0), 0, False),
        (("kd.coef=0.1",), (None, None), 0, False),
        (("kd.coef={kind: linear, start: 0.1, end: 0.0, over: 5}",), (0.0, 0.0), 4, True),
        (("kd.coef={kind: linear, start: 0.1, end: 0.0, over: 5}",), (0.0, 0.0), 5, False),
    ],
)
def test_a_group_carries_a_gradient_for_kdrl_as_long_as_something_is_distilled(overrides, rewards, iteration, carries):
    algorithm = KDRL(config(*(f"algorithm.{o}" for o in overrides)))
    assert algorithm.has_gradient(group_of(*rewards), iteration) == carries


@pytest.mark.parametrize("recipe", ["grpo", "kdrl", "dapo", "drgrpo", "gspo", "rloo", "cispo"])
def test_the_recipes_load(recipe):
    paths = ["model.path=m", "data.path=d"] + ["teacher.path=t"] * (recipe == "kdrl")
    assert load([f"configs/{recipe}.yaml"], paths).config.run.name == recipe
