"""Algorithms that train on completions from the data: SFT, REDI, TAID."""

import json
from pathlib import Path

import pytest
import torch
from builders import Captured, assert_same, config, opened, real_batch

from rlkd.algorithms import redi
from rlkd.algorithms.taid import TAID
from rlkd.config.load import ConfigError
from rlkd.config_file import load_stages
from rlkd.distributed import RunStopped
from rlkd.models.student import load_causal_lm
from rlkd.run.fit import run_stages
from rlkd.types import AUTHORS, Prompt

pytestmark = pytest.mark.long

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
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


def test_a_prompt_without_a_rejected_completion_is_one_line():
    """Rows of a file are checked when they are read; a source of one's own may lack it."""
    with pytest.raises(RunStopped, match="^prompt 'p': expected a rejected completion, got none; set data.rej"):
        redi._rejected(Prompt(id="p", messages=(), token_ids=(5,)))


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


def test_redi_subtracts_alpha_times_the_rejected(pairs):
    """Eq. 5 is linear in α, and its two terms are SFT on the two columns."""
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
        seen.append(module.iteration_ended(iteration, {"loss/kd": loss})["taid/t"])
        assert 0.4 + 0.5 * min(iteration / 50, 1) <= module.t + 1e-12 <= 0.9 + 1e-12
    assert seen == sorted(seen) and seen[:2] == [0.4, 0.4] and seen[-1] == 0.9


def test_taids_first_adaptive_step_by_hand():
    """δ = (1 − 0.5)/1, m = 0.01·δ, t += α·sigmoid(m)·(1 − t); the straight line is far below."""
    module = after(", t_start: 0.4, over: 1000000, step: 0.1", 1.0, 0.5)
    sigmoid = 1 / (1 + 2.718281828459045 ** -(0.01 * 0.5))
    assert module.t == pytest.approx(0.4 + 0.1 * sigmoid * 0.6, abs=1e-12)


def after(options, *losses):
    """TAID after iterations with the given losses."""
    module = TAID(taid(options=options))
    for iteration, loss in enumerate(losses):
        module.iteration_ended(iteration, {"loss/kd": loss})
    return module


def test_taids_linear_schedule_is_the_authors():
    """Their first step only stores its loss; after step i ≥ 1, t is that of the line at i / N."""
    line = [after(", t_start: 0.4, over: 10, step: 0.0", *[1.0] * n).t for n in range(13)]
    assert line == pytest.approx([0.4, 0.4, *(0.4 + 0.06 * i for i in range(1, 11)), 1.0])


@pytest.mark.parametrize("losses", [(0.0, 1e-6), (1e-8, 1e-3), (2e-7, 0.05), (0.0, 0.0), (1e-12, 5.0), (-0.1, 3.0)])
def test_taid_continues_after_a_loss_of_zero(losses):
    """If the teacher is the initial student, or t_start is 0, the next loss is many times the first."""
    module = after(", t_start: 0.4, over: 1000000, step: 0.1", *losses)
    assert -0.010001 <= module.momentum <= 0.0
    assert module.t == pytest.approx(0.43, abs=3e-4)  # sigmoid of about 0


def test_one_jump_of_the_loss_does_not_end_taids_adaptive_step():
    """Bounded, δ = −10,000 moves the momentum by 0.01; the next steps are as large as without it."""
    straight, jumped = ([1.0] * 50, [1e-4, 1.0] + [1.0] * 48)
    a, b = (after(", t_start: 0.4, over: 1000000, step: 0.001", *losses).t for losses in (straight, jumped))
    assert b == pytest.approx(a, abs=1e-4) and a > 0.41


def test_taid_resumes_from_an_older_checkpoint_with_any_momentum():
    module = TAID(taid(options=", t_start: 0.4, over: 100, step: 0.1"))
    module.load_state_dict({"skipped": [], "taid": {"t": 0.5, "momentum": -1e6, "before": 1e-9}})
    metrics = module.iteration_ended(7, {"loss/kd": 0.3})
    assert module.t == pytest.approx(0.5) and metrics == {"taid/t": 0.5}


@pytest.mark.parametrize("options", [", t_start: 0.0", ", t_start: 0.4"])
def test_a_teacher_that_is_the_students_start_can_be_followed(options, tmp_path, monkeypatch):
    """Two real iterations: the loss of the first one is 0."""
    monkeypatch.chdir(tmp_path)
    same = [] if "0.0" in options else ["teacher.path=builtin:student"]
    text = f"algorithm={{name: taid{options}}}"
    overrides = (
        "data.completion_column=answer",
        *LIMIT,
        "run.iterations=3",
        "eval.every=0",
        "log.progress=false",
        text,
    )
    assert run_stages(load_stages([QUICKSTART], ["optim.lr=0.01", *overrides, *same])) == 0
    rows = [json.loads(line) for line in Path("runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["loss/kd"]) < 1e-6 and rows[2]["taid/t"] > float(options.split()[-1])


@pytest.mark.parametrize("name", ["taid", "opd", "opsd"])
def test_distillation_needs_no_answers(name, tmp_path, monkeypatch):
    """Chat data: the reward of every row fails, which is counted but changes nothing else and ends no evaluation."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"reverse: {'abcdefgh'[:n]}", "reply": "hgfedcba"[-n:]} for n in (7, 3, 8, 5)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = ", context: {template: '{prompt}{context}', reference: ' hint: {text}'}, divergence: {clip: null}"
    overrides = [
        *("data.path=chat.jsonl", "data.answer_column=null", "data.max_completion_tokens=32", "rollout.prompts=4"),
        *("eval.path=chat.jsonl", "eval.every=1", "run.iterations=1", "log.progress=false"),
        f"data.{'privileged' if name == 'opsd' else 'completion'}_column=reply",
        f"algorithm={{name: {name}, group_size: 1{shown if name == 'opsd' else ''}}}",
        *(["teacher={backend: self}"] if name == "opsd" else []),
    ]
    assert run_stages(load_stages([QUICKSTART], overrides)) == 0
    (row,) = [json.loads(line) for line in Path("runs/quickstart/metrics.jsonl").read_text().splitlines()][-1:]
    assert row["reward/errors"] == 4 and row["grad_norm"] > 0 and row["tokens/trained"] > 4
    assert "accuracy" not in row and row["eval/errors"] == 4 * 5


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
