"""Stages on completions of the data: SFT, REDI, TAID."""

import json

import pytest
import torch
from builders import Captured, assert_same, config, opened, real_batch

from rlkd.algorithms import TAID
from rlkd.config_file import ConfigError
from rlkd.student import load_causal_lm
from rlkd.types import AUTHORS

pytestmark = pytest.mark.long

NO_CLIP = "optim.max_grad_norm=1000000.0"
LIMIT = ("data.max_completion_tokens=32", "data.limit=16", "rollout.prompts=4", "log.rollouts_every=0")


@pytest.fixture
def pairs(tmp_path):
    """Chosen and rejected completions of several lengths, as JSONL."""
    rows = [
        {"prompt": f"reverse: {'abcdefgh'[:n]}", "chosen": "hgfedcba"[-n:], "rejected": "x" * (n // 2 + 1)}
        for n in (7, 3, 8, 5)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


def settings(name, path="builtin:reverse", *overrides, options=""):
    columns = (
        ["data.completion_column=answer"]
        if path == "builtin:reverse"
        else [
            "data.answer_column=null",
            "data.completion_column=chosen",
            "data.rejected_column=rejected",
        ]
    )
    algorithm = f"algorithm={{name: {name}{options}}}"
    teacher = [] if name in ("taid", "opd") else ["teacher=null"]
    everything = [f"data.path={path}", *columns, *LIMIT, NO_CLIP, *overrides, algorithm, *teacher]
    return config(*everything, group_size=None)


def plain_nll(batch, per_sequence):
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    logits = hf(batch.input_ids).logits[:, :-1]
    nll = -logits.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    mask = batch.completion_mask[:, 1:].float()
    if per_sequence:
        loss = ((nll * mask).sum(1) / mask.sum(1)).mean()
    else:
        loss = (nll * mask).sum() / mask.sum()
    loss.backward()
    return float(loss), {name: p.grad for name, p in hf.named_parameters()}


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_sft_is_the_cross_entropy_of_the_datas_completions(pairs, reduction):
    plain = settings("sft", pairs, options=f", reduction: {reduction}")
    batch = real_batch(plain)
    assert batch.completion_mask.sum() == sum((8, 4, 9, 6)) and not batch.student_mask.any(), "end of sequence included"
    captured = Captured(plain, batch)
    loss, gradients = plain_nll(batch, reduction == "sequence_mean")
    assert captured.row["loss"] == pytest.approx(loss, rel=1e-5)
    assert "mismatch/mean" not in captured.row and "accuracy" not in captured.row
    assert_same(captured.gradients, gradients, 1e-6)


def test_sft_in_micro_batches_is_the_same(pairs):
    whole = settings("sft", pairs)
    split = settings("sft", pairs, "trainer.micro_batch_tokens=48", "data.max_completion_tokens=16")
    batch = real_batch(whole)
    assert_same(Captured(whole, batch).gradients, Captured(split, batch).gradients, 1e-6)


def test_redi_without_the_rejected_is_sft_with_its_sequence_mean(pairs):
    redi = settings("redi", pairs, options=", alpha: 0")
    sft = settings("sft", pairs, options=", reduction: sequence_mean")
    a, b = Captured(redi, real_batch(redi)), Captured(sft, real_batch(sft))
    assert a.row["loss"] == pytest.approx(b.row["loss"], rel=1e-6)
    assert_same(a.gradients, b.gradients, 1e-6)


def test_redi_takes_off_alpha_times_the_rejected(pairs):
    """Eq. 5 is linear in α, and its two halves are SFT on either column."""
    redi, sft = (
        settings("redi", pairs, options=", alpha: 0.8"),
        settings("sft", pairs, options=", reduction: sequence_mean"),
    )
    swapped = settings(
        "sft",
        pairs,
        "data.completion_column=rejected",
        "data.rejected_column=chosen",
        options=", reduction: sequence_mean",
    )
    got = Captured(redi, real_batch(redi))
    chosen, rejected = Captured(sft, real_batch(sft)), Captured(swapped, real_batch(swapped))
    assert_same(got.gradients, {n: g - 0.8 * rejected.gradients[n] for n, g in chosen.gradients.items()}, 2e-6)
    assert got.row["chosen/logprob"] == pytest.approx(-chosen.row["loss"], rel=1e-5)
    assert got.row["rejected/logprob"] == pytest.approx(-rejected.row["loss"], rel=1e-5)


def taid(*overrides, options=""):
    return settings("taid", "builtin:reverse", *overrides, options=options)


def test_taid_at_t_0_has_no_gradient_and_at_t_1_is_the_forward_kl():
    at_0, at_1 = taid(options=", t_start: 0.0, t_end: 0.0"), taid(options=", t_start: 1.0")
    batch = real_batch(at_0)
    assert max(g.abs().max() for g in Captured(at_0, batch).gradients.values()) < 1e-6
    opd = settings(
        "opd",
        "builtin:reverse",
        options=", student_share: 0.0, group_size: 1, divergence: {kind: forward_kl}",
    )
    wanted = Captured(opd, batch)
    assert_same(Captured(at_1, batch).gradients, wanted.gradients, 1e-7)
    assert max(g.abs().max() for g in wanted.gradients.values()) > 1e-3


def test_taids_t_never_falls_and_stays_between_the_line_and_its_end():
    module = TAID(taid(options=", t_start: 0.4, t_end: 0.9, over: 50, step: 0.05"))
    seen = []
    for iteration, loss in enumerate([1.0, 0.5, 0.9, 2.0, 0.1, 0.05] * 12):
        module.row = {"loss/kd": loss}
        module.iteration_ended(iteration)
        seen.append(module.row["taid/t"])
        assert 0.4 + 0.5 * min((iteration + 1) / 50, 1) <= module.t + 1e-12 <= 0.9 + 1e-12
    assert seen == sorted(seen) and seen[0] == 0.4 and seen[-1] == 0.9


def test_taids_first_adaptive_step_by_hand():
    """δ = (1 − 0.5)/1, m = 0.01·δ, t += α·sigmoid(m)·(1 − t); the straight line is far below."""
    module = TAID(taid(options=", t_start: 0.4, over: 1000000, step: 0.1"))
    for iteration, loss in enumerate((1.0, 0.5)):
        module.row = {"loss/kd": loss}
        module.iteration_ended(iteration)
    sigmoid = 1 / (1 + 2.718281828459045 ** -(0.01 * 0.5))
    assert module.t == pytest.approx(0.4000006 + 0.1 * sigmoid * 0.6, abs=2e-6)


def test_completions_longer_than_the_bound_name_the_key(pairs):
    with pytest.raises(
        ValueError, match=r"the completion of '0' has 8 tokens, more than\s+data.max_completion_tokens = 7"
    ):
        real_batch(settings("sft", pairs, "data.max_completion_tokens=7"))


@pytest.mark.parametrize(
    ("name", "overrides", "line"),
    [
        ("sft", ("data.completion_column=null",), "data.completion_column: is null"),
        ("redi", (), "data.rejected_column: is null"),
        ("sft", ("data.max_completion_tokens=9000",), "trainer.micro_batch_tokens: is 8192, less than one sequence"),
        ("taid", ("algorithm.divergence.tier=sampled",), "algorithm.divergence.tier"),
        ("taid", ("algorithm.t_end=0.1",), "algorithm.t_end: is 0.1, below algorithm.t_start"),
    ],
)
def test_contradictions_are_one_line_each(name, overrides, line):
    with pytest.raises(ConfigError) as caught:
        settings(name, "builtin:reverse", *overrides)
    assert any(line in text for text in caught.value.lines), caught.value.lines


def test_offline_rows_have_no_version_and_no_reward(pairs):
    plain = settings("redi", pairs)
    loader = opened(plain)
    batch = loader.batch(0)
    loader.close()
    assert batch.weight_version.tolist() == [-1] * 8 and batch.rewards.isnan().all()
    assert batch.sampler_logprobs.isnan().all() and not batch.student_mask.any()
    assert set(batch.authors[batch.completion_mask].tolist()) == {AUTHORS.index("data")}
