"""The update: the loss does not depend on how the work is split, and algorithms reduce to each other."""

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
    with_scores,
)
from families import write

from rlkd.algorithms.grpo import GRPO as GRPOModule
from rlkd.algorithms.kdrl import KDRL
from rlkd.models.student import blocks, load_causal_lm
from rlkd.pipeline.collate import collate


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "dr_grpo"])
def test_micro_batches_change_no_gradient(reduction):
    settings = (NO_CLIP, f"algorithm.reduction={reduction}", "algorithm.kd.mask=response")
    whole = Captured(config(*settings))
    # The longest row has 16 tokens: one to three rows a micro-batch.
    split = Captured(config(*settings, "trainer.micro_batch_tokens=48", "rollout.max_tokens=12"))
    if reduction == "dr_grpo":  # its constant is the budget
        whole = Captured(config(*settings, "rollout.max_tokens=12"))
    assert_moved(whole)
    assert_same(whole.gradients, split.gradients, 1e-6)
    for name in ("loss", "loss/pg", "loss/kd", "kd/kl", "entropy", "mismatch/mean"):
        assert whole.row[name] == pytest.approx(split.row[name], rel=1e-5), name


def test_kdrl_with_coefficient_zero_is_grpo_bit_for_bit():
    grpo = Captured(config(*GRPO))
    kdrl = Captured(config("algorithm.kd.coef=0"))
    assert_moved(grpo)
    assert_same(grpo.gradients, kdrl.gradients, 0)
    assert_same(grpo.parameters, kdrl.parameters, 0)


@pytest.mark.parametrize("mask", ["none", "response", "group"])
def test_kdrl_with_zero_advantages_is_the_coefficient_times_distillation(mask):
    settings = (NO_CLIP, f"algorithm.kd.mask={mask}")
    algorithm = KDRL(config(*settings))
    batch = collate(groups(algorithm), 0)
    batch = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
    kdrl = Captured(config(*settings, "algorithm.kd.coef=0.25"), batch)
    distillation = Captured(config(*settings, "algorithm.kd.coef=1", "algorithm.policy_coef=0"))
    assert_moved(distillation)
    assert_same(kdrl.gradients, {n: 0.25 * g for n, g in distillation.gradients.items()}, 0)


@pytest.mark.parametrize("denominator", ["all", "kept"])
@pytest.mark.parametrize("mask", ["none", "response"])
def test_joint_k2_and_the_advantage_form_have_the_same_gradient_on_policy(mask, denominator):
    settings = (
        NO_CLIP,
        "algorithm.kd.coef=0.3",
        f"algorithm.kd.mask={mask}",
        f"algorithm.kd.denominator={denominator}",
    )
    joint = Captured(config(*settings))
    advantage = Captured(config(*settings, "algorithm.kd.form=advantage"))
    assert_moved(joint)
    assert_same(joint.gradients, advantage.gradients, 2e-6)


def test_masked_samples_change_nothing():
    """A failed reward masks its row: its contents change neither gradients nor metrics."""
    algorithm = KDRL(config())
    made = groups(algorithm, rewards=(1.0, 0.0, None, 1.0, 0.0, 0.0, 0.0, 0.0))
    batch = collate(made, 0)
    other = dataclasses.replace(
        with_scores(
            batch, "teacher", logprobs=batch.scores["teacher"].logprobs.index_fill(0, torch.tensor([2]), -99.0)
        ),
        input_ids=batch.input_ids.index_fill(0, torch.tensor([2]), 7),
        advantages=batch.advantages.index_fill(0, torch.tensor([2]), 5.0),
    )
    a, b = Captured(config(), batch), Captured(config(), other)
    assert_moved(a)
    assert_same(a.gradients, b.gradients, 0)
    assert a.row["loss"] == b.row["loss"] and a.row["kd/kl"] == b.row["kd/kl"]


def test_groups_without_variance_keep_their_distillation_gradient():
    def gradient(*settings):
        batch = collate(groups(KDRL(config(*settings)), rewards=(0.0,) * 8), 0)
        return max(g.abs().max() for g in Captured(config(*settings), batch).gradients.values())

    assert gradient("algorithm.kd.coef=1") > 1e-3
    assert gradient("algorithm.kd.coef=0") == 0
    assert gradient("algorithm.kd.coef=1", "algorithm.kd.mask=group") > 1e-3


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ("none", [True] * 8),
        ("response", [r < 1 for r in REWARDS]),
        ("group", [False] * 4 + [True] * 4),
    ],
)
def test_reward_guided_masks_on_a_two_by_four_matrix(mask, kept):
    algorithm = KDRL(config(f"algorithm.kd.mask={mask}"))
    rows = [s for group in groups(algorithm) for s in group]
    assert [all(s.masks["kd"]) for s in rows] == kept
    assert [any(s.masks["kd"]) for s in rows] == kept


def test_mask_eos_spares_the_last_token_of_finished_completions_only():
    algorithm = KDRL(config("algorithm.kd.mask_eos=true"))
    for s in (s for group in groups(algorithm) for s in group):
        finished = s.rollout.finish_reason == "stop"
        assert s.masks["kd"] == (True,) * (len(s.masks["kd"]) - 1) + (not finished,)


def test_denominator_kept_rescales_by_the_kept_share():
    """6 of 8 completions failed; both forms differ by kept tokens / all tokens."""
    settings = (NO_CLIP, "algorithm.policy_coef=0", "algorithm.kd.coef=1", "algorithm.kd.mask=response")
    over_all = Captured(config(*settings))
    over_kept = Captured(config(*settings, "algorithm.kd.denominator=kept"))
    kept = sum(n for n, r in zip(LENGTHS, REWARDS, strict=True) if r < 1)
    share = kept / sum(LENGTHS)
    assert_same(over_all.gradients, {n: share * g for n, g in over_kept.gradients.items()}, 1e-6)


@pytest.mark.parametrize(
    ("log_ratio", "options", "flipped"),
    [
        (-6.0, (), 1.0),  # 1 + 0.2 · −6 < 0
        (-4.0, (), 0.0),  # 1 + 0.2 · −4 > 0: reduced, but not reversed
        (6.0, (), 0.0),
        (-6.0, ("algorithm.kd.form=advantage",), 1.0),
        (-6.0, ("algorithm.kd.estimator=k3",), 0.0),  # 1 + 0.2 · (e^−6 − 1) > 0
        (-6.0, ("algorithm.kd.coef=0.1",), 0.0),
        (-6.0, ("algorithm.policy_coef=2",), 0.0),
    ],
)
def test_a_token_is_flipped_where_the_teacher_reverses_its_advantage(log_ratio, options, flipped):
    """A = 1 and R = log T − log π everywhere, β = 0.2: A + βR against A."""
    settings = config(*options)
    batch = collate(groups(KDRL(settings)), 0)
    batch = with_scores(batch, "teacher", logprobs=own_logprobs(settings, batch) + log_ratio)
    batch = dataclasses.replace(batch, advantages=torch.ones_like(batch.advantages))
    assert Captured(settings, batch).row["kd/flipped"] == pytest.approx(flipped)


@pytest.mark.parametrize(
    ("family", "of_two_dimensions"),
    [
        (None, ()),
        ("gpt_oss", ("experts.gate_up_proj_bias", "experts.down_proj_bias")),
        ("mamba", ("A_log",)),
    ],
)
def test_weight_decay_leaves_norms_biases_and_log_scales_alone(family, of_two_dimensions, tmp_path):
    """As AdamW's on the rest: θ ← (1 − lr · decay) θ before the step, which does not depend on θ."""
    rate, decay, path = 0.01, 0.3, "builtin:student"
    if family is not None:
        write(family, tmp_path)
        path = str(tmp_path)
    settings = (*GRPO, f"model.path={path}", f"optim.lr={rate}", NO_CLIP)
    start = dict(load_causal_lm(path, torch.float32, attention=None, trust_remote_code=False).state_dict())
    plain, decayed = Captured(config(*settings)), Captured(config(*settings, f"optim.weight_decay={decay}"))
    spared = [name for name, p in plain.parameters.items() if p.dim() == 1 or name.endswith(of_two_dimensions)]
    assert any("norm" in name for name in spared)
    for ending in of_two_dimensions:
        assert any(name.endswith(ending) and plain.parameters[name].dim() == 2 for name in spared), ending
    for name, value in plain.parameters.items():
        shrunk = value if name in spared else value - rate * decay * start[name]
        torch.testing.assert_close(
            decayed.parameters[name], shrunk, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_teacher_equal_to_the_student_gives_no_distillation():
    settings = config("algorithm.policy_coef=0", "algorithm.kd.coef=1")
    batch = collate(groups(KDRL(settings)), 0)
    captured = Captured(settings, with_scores(batch, "teacher", logprobs=own_logprobs(settings, batch)))
    assert captured.row["kd/kl"] == pytest.approx(0.0, abs=1e-9)
    assert max(g.abs().max() for g in captured.gradients.values()) < 1e-5


def test_the_second_of_two_updates_sees_a_ratio():
    """With clip bounds of 0, only a policy that has changed since the old log-probs can be clipped."""
    narrow = ("algorithm.clip_low=0", "algorithm.clip_high=0", "optim.lr=0.01", *GRPO)
    one = Captured(config(*narrow))
    two = Captured(config(*narrow, "trainer.updates_per_iteration=2"))
    assert one.row["clip_fraction"] == 0
    assert 0 < two.row["clip_fraction"] < 1
    assert one.row["update"] == 1 and two.row["update"] == 2
    assert one.row["mismatch/mean"] == pytest.approx(two.row["mismatch/mean"], rel=1e-5)


def test_reference_kl_is_zero_at_the_start_and_positive_elsewhere():
    settings = config(*GRPO, "algorithm.reference_coef=1", NO_CLIP)
    batch = collate(groups(GRPOModule(settings), rewards=(0.0,) * 8), 0)
    start = Captured(settings, with_scores(batch, "reference", logprobs=own_logprobs(settings, batch)))
    assert start.row["reference/kl"] == pytest.approx(0.0, abs=1e-9)
    assert max(g.abs().max() for g in start.gradients.values()) < 1e-5
    elsewhere = Captured(settings, batch)
    assert elsewhere.row["reference/kl"] > 0.01
    assert_moved(elsewhere)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_prompt_token_that_the_student_finds_impossible_does_no_harm(estimator):
    """Prompt and padding columns have no score: k3 with a 0 in its place would overflow to inf, and 0 · inf is NaN."""
    cold = ("rollout.temperature=0.02", "teacher.temperature=0.02")
    settings = config(*cold, f"algorithm.kd.estimator={estimator}", "algorithm.policy_coef=0")
    batch = collate(groups(KDRL(settings)), 0)
    own = own_logprobs(settings, batch)
    assert own[~batch.completion_mask].min() < -200, "otherwise nothing could overflow"
    teacher = torch.where(batch.completion_mask, own - 0.1, 0.0)
    captured = Captured(settings, with_scores(batch, "teacher", logprobs=teacher))
    assert all(g.isfinite().all() for g in captured.gradients.values())


@pytest.mark.parametrize(("every", "recomputed"), [(1, 2), (2, 1), (9, 1)])
def test_gradient_checkpointing_changes_no_gradient(every, recomputed):
    again = Captured(config("model.gradient_checkpointing=true", f"model.recompute_every={every}"))
    assert_same(Captured(config()).gradients, again.gradients, 1e-7)
    assert sum(block.training for block in blocks(again.student.hf)) == recomputed


def test_bf16_computes_in_half_and_keeps_fp32_masters():
    half, full = Captured(config("trainer.precision=bf16")), Captured(config())
    assert all(p.dtype == torch.float32 for p in half.parameters.values())
    assert all(g.dtype == torch.float32 for g in half.gradients.values())
    assert half.row["entropy"] == pytest.approx(full.row["entropy"], rel=0.1)
    assert half.row["entropy"] != full.row["entropy"]


def test_a_large_mismatch_stops_before_any_step():
    with pytest.raises(RuntimeError, match=r"sampler and trainer disagree by .* rollout.max_mismatch = 0.01"):
        Captured(config("rollout.max_mismatch=0.01"))


def test_a_row_longer_than_the_budget_names_the_key():
    with pytest.raises(
        ValueError, match=r"trainer.micro_batch_tokens: expected at least 16, the tokens of a rollout, got 14"
    ):
        Captured(config("trainer.micro_batch_tokens=14", "rollout.max_tokens=8", "data.max_prompt_tokens=6"))


def test_k1_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="k1 = log π − log T has zero expected gradient"):
        config("algorithm.kd.estimator=k1")
