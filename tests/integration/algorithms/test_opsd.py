"""Self-distillation: laws of the privileged prompt, and the kinds of context."""

import asyncio
import dataclasses

import pytest
import torch
from builders import Captured, config, local_scorer, opened, real_batch, rolled, scored
from hypothesis import given
from hypothesis import strategies as st

from rlkd.algorithms.opsd import OPSD
from rlkd.algorithms.privileged_prompt import privileged_prompt
from rlkd.algorithms.privileged_prompt_options import ContextConfig
from rlkd.algorithms.sdpo import SDPO
from rlkd.config.load import ConfigError
from rlkd.data.chat import filled, load_tokenizer
from rlkd.distributed import RunStopped
from rlkd.metrics import MetricAccumulator
from rlkd.models.weights import Whole
from rlkd.pipeline.collate import collate
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Prompt, Signal, TeacherScores

pytestmark = pytest.mark.long

HINT = "context: {template: '{prompt}{context}', reference: ' hint: {text}'}"
SELF = "teacher={backend: self}"
SMALL = ("rollout.prompts=4", "rollout.max_mismatch=0.001", "data.limit=16", "log.rollouts_every=0")
NO_CLIP = "optim.max_grad_norm=1000000.0"


def settings(*overrides, name="opsd", options=HINT, teacher=SELF):
    return config(teacher, f"algorithm={{name: {name}, {options}}}", *SMALL, NO_CLIP, *overrides)


def largest(captured):
    return max(float(g.abs().max()) for g in captured.gradients.values())


DIVERGENCES = [
    "{kind: forward_kl, clip: null}",
    "{kind: reverse_kl, clip: null}",
    "{kind: jsd, beta: 0.3, clip: null}",
    "{tier: top_k, k: 5, clip: null}",
    "{tier: top_k, k: 5, support: student, tail: false, clip: null}",
    "{tier: sampled, kind: reverse_kl, clip: null}",
]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_empty_privileged_prompt_and_the_start_as_teacher_give_no_loss(divergence):
    same = settings(f"algorithm.divergence={divergence}", options="context: {template: '{prompt}', reference: null}")
    captured = Captured(same, real_batch(same))
    assert abs(captured.row["loss"]) < 1e-6 and largest(captured) < 1e-5
    hinted = settings(f"algorithm.divergence={divergence}")
    assert largest(Captured(hinted, real_batch(hinted))) > 1e-2


def test_a_hint_that_the_chat_template_refuses_is_one_line():
    """The student's prompts were rendered before the run began; the teacher's are made while it runs."""
    tokenizer = load_tokenizer("builtin:student")
    tokenizer.chat_template = "{% if 'hint' in messages[0].content %}{{ raise_exception('too much') }}{% endif %}"
    data, prompt = (
        config().data,
        Prompt(id="p7", messages=({"role": "user", "content": "reverse: abc"},), token_ids=(5,)),
    )
    privileged_prompt(tokenizer, prompt, "{prompt}", [], data)
    with pytest.raises(
        RunStopped, match="^prompt 'p7': expected a chat template [^\n]*too much; change the template [^\n]*$"
    ):
        privileged_prompt(tokenizer, prompt, "{prompt}{context}", [" hint: cba"], data)


def test_permuting_the_hints_changes_the_loss():
    plain = settings("algorithm.divergence.clip=null")
    loader = opened(plain)
    right = Captured(plain, loader.batch(0)).row["loss"]
    prompts = loader.line.prompts.take(0, 4)
    moved = {p.id: prompts[(i + 1) % 4].privileged for i, p in enumerate(prompts)}
    shown = loader.algorithm.teacher_prompt

    def another(scored, group):
        prompt = dataclasses.replace(scored.rollout.prompt, privileged=moved[scored.rollout.prompt.id])
        return shown(dataclasses.replace(scored, rollout=dataclasses.replace(scored.rollout, prompt=prompt)), group)

    loader.algorithm.teacher_prompt = another
    wrong = Captured(plain, loader.batch(0)).row["loss"]
    loader.close()
    assert abs(right - wrong) > 0.1


def test_teacher_and_student_prompts_of_different_length_align():
    """The teacher's scores of a completion equal those of a plain forward pass over its own, longer prompt."""
    plain = settings()
    loader = opened(plain)
    batch = loader.batch(0)
    teacher, rows = loader.line.teacher, loader.line.prompts.take(0, 4)
    for first, prompt in enumerate(rows):
        row = first * plain.algorithm.group_size
        start, end = len(prompt.token_ids), int(batch.lengths[row])
        completion = tuple(batch.input_ids[row, start:end].tolist())
        (group,) = rolled(loader.algorithm, [prompt], loader.policy)
        ids = loader.algorithm.teacher_prompt(scored_of(group[0]), [])
        assert len(ids) > start, "the prompt with the hint is longer"
        with torch.no_grad():
            logits = teacher.hf(torch.tensor([[*ids, *completion]])).logits[0, len(ids) - 1 : -1]
            ours = (
                batch.scores["teacher"]
                .layers[0]
                .logits(batch.scores["teacher"].hidden[row, start:end], logits.shape[1])
            )
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        torch.testing.assert_close(batch.scores["teacher"].logprobs[row, start:end], own, atol=1e-4, rtol=0)
    loader.close()


def scored_of(rollout):
    return dataclasses.replace(scored(0, 1, 0.0), rollout=rollout, scores={})


def test_the_clip_bounds_each_vocabulary_entry():
    """If the teacher with the hint is certain and the student is not, the entry is far above τ and has no gradient."""
    free, capped = settings("algorithm.divergence.clip=null"), settings("algorithm.divergence.clip=0.05")
    assert capped.algorithm.divergence.clip == settings().algorithm.divergence.clip, "the paper's τ is the default"
    assert largest(Captured(capped, real_batch(capped))) < 0.1 * largest(Captured(free, real_batch(free)))


def attempts(*rewards, feedback=None):
    prompt = Prompt(id="q", messages=({"role": "user", "content": "reverse: ab"},), token_ids=(4, 5))
    rows = [scored(i, 3, r, scores={}, feedback=feedback) for i, r in enumerate(rewards)]
    return [dataclasses.replace(s, rollout=dataclasses.replace(s.rollout, prompt=prompt)) for s in rows]


def test_a_sibling_is_the_first_other_success_and_a_rollout_without_one_is_masked():
    sdpo = SDPO(settings(name="sdpo", options="context: {template: '{prompt}{context}', sibling: ' seen: {text}'}"))
    group = attempts(0.0, 1.0, 1.0, None)
    first, second = (sdpo.text(group[i].rollout) for i in (1, 2))
    told = [sdpo.parts(s, group) for s in group]
    assert told == [[f" seen: {first}"], [f" seen: {second}"], [f" seen: {first}"], [f" seen: {first}"]]
    alone = attempts(0.0, 1.0, 0.0)
    prompts = [sdpo.teacher_prompt(s, alone) for s in alone]
    assert prompts[1] is None and prompts[0] is not None and prompts[2] is not None
    score = TeacherScores(logprobs=(-1.0, -1.0, -1.0))
    asked = [
        dataclasses.replace(s, scores={} if p is None else {"teacher": score})
        for s, p in zip(alone, prompts, strict=True)
    ]
    assert [s.masks["kd"] for s in sdpo.advantages(asked)] == [(True,) * 3, (False,) * 3, (True,) * 3]


def test_thoughts_are_left_out_of_a_sibling_and_feedback_is_shown():
    context = ContextConfig(template="{prompt}{context}", sibling="[{text}]", feedback="({text})")
    assert context.parts("never", "<think>long</think> cba", "wrong") == ["[cba]", "(wrong)"]
    assert context.parts("never", None, None) == []


def test_sdpo_shows_feedback_only_where_there_is_no_sibling():
    """`environment_feedback_only_without_solution` of the authors' code; an option here, on for SDPO alone."""
    templates = "template: '{prompt}{context}', sibling: '[{text}]', feedback: '({text})'"
    sdpo = SDPO(settings(name="sdpo", options=f"context: {{{templates}}}"))
    both = SDPO(settings(name="sdpo", options=f"context: {{{templates}, feedback_beside_sibling: true}}"))
    group = attempts(0.0, 1.0, 0.0, feedback="wrong sum")
    seen = f"[{sdpo.text(group[1].rollout)}]"
    assert [sdpo.parts(s, group) for s in group] == [[seen], ["(wrong sum)"], [seen]]
    assert [both.parts(s, group) for s in group] == [[seen, "(wrong sum)"], ["(wrong sum)"], [seen, "(wrong sum)"]]
    alone = attempts(0.0, 0.0, feedback="wrong sum")
    assert [sdpo.parts(s, alone) for s in alone] == [["(wrong sum)"]] * 2
    unseen = ContextConfig(sibling=None, feedback="({text})", feedback_beside_sibling=False)
    assert unseen.parts(None, "cba", "wrong") == ["(wrong)"], "a sibling that is not shown does not hide feedback"
    assert (
        ContextConfig().feedback_beside_sibling and SDPO.Options(name="sdpo").context.feedback_beside_sibling is False
    )


def test_the_ratio_cap_is_on_for_sdpo_alone():
    caps = {name: settings(name=name, options="group_size: 4").algorithm.ratio_cap for name in ("opsd", "sdpo", "opd")}
    assert caps == {"opsd": None, "sdpo": 2.0, "opd": None}
    assert SDPO(settings(name="sdpo", options="group_size: 4")).needs.comparison.ratio_cap == 2.0


@pytest.mark.parametrize(
    ("name", "parts", "needed"),
    [
        ("opsd", "reference: ' {text}'", False),
        ("opsd", "reference: ' {text}', sibling: ' {text}'", True),
        ("opsd", "reference: ' {text}', feedback: ' {text}'", True),
        ("sdpo", "sibling: ' {text}'", True),
    ],
)
def test_rewards_are_needed_if_the_teacher_is_shown_their_feedback(name, parts, needed):
    made = settings(name=name, options=f"context: {{template: '{{prompt}}{{context}}', {parts}}}")
    assert {"opsd": OPSD, "sdpo": SDPO}[name](made).needs_rewards is needed


def test_a_failed_reward_takes_no_completion_from_sdpo():
    """It is no sibling itself, but it is shown another's success."""
    sdpo = SDPO(settings(name="sdpo", options="context: {template: '{prompt}{context}', sibling: ' seen: {text}'}"))
    group = attempts(None, 1.0, None)
    assert [s.error for s in group] == ["failed", None, "failed"]
    score = TeacherScores(logprobs=(-1.0, -1.0, -1.0))
    prompts = [sdpo.teacher_prompt(s, group) for s in group]
    asked = [
        dataclasses.replace(s, scores={} if p is None else {"teacher": score})
        for s, p in zip(group, prompts, strict=True)
    ]
    batch = collate([sdpo.advantages(asked)], 0, mask_failed=sdpo.masks_failed)
    assert batch.masks["kd"].sum(1).tolist() == [3, 0, 3]


def test_a_rank_none_of_whose_completions_has_a_context_trains_on_nothing():
    """No success to show: the teacher is not asked, but the update must run, for the other ranks' sake."""
    made = settings("rollout.max_mismatch=100", name="sdpo", options="group_size: 4")
    sdpo, layers = SDPO(made), {"teacher": local_scorer().layers()}
    rows = [sdpo.advantages(attempts(0.0, 0.0, 0.0, 0.0))]
    found = Captured(made, collate(rows, 0, layers, scorers=("teacher",), mask_failed=sdpo.masks_failed))
    assert found.row["loss"] == 0.0 and all(not g.any() for g in found.gradients.values())


def test_a_context_that_is_too_long_counts_as_none():
    opsd = OPSD(settings("algorithm.context.max_tokens=8"))
    with_hint = dataclasses.replace(attempts(0.0)[0].rollout.prompt, privileged="x" * 20)
    (row,) = attempts(0.0)
    row = dataclasses.replace(row, rollout=dataclasses.replace(row.rollout, prompt=with_hint))
    assert opsd.teacher_prompt(row, [row]) is None


@given(st.text(), st.text(), st.text())
def test_filling_happens_once_and_leaves_other_braces(prompt, context, rest):
    template = r"\boxed{} {prompt}|{context}|{text} {{x}}"
    assert filled(template, {"prompt": prompt, "context": context}) == (
        r"\boxed{} " + prompt + "|" + context + "|{text} {{x}}"
    )


def test_right_and_shuffled_hints_give_different_losses():
    plain = settings("algorithm.leakage_every=2")
    loader = opened(plain)
    figures = loader.batch(0).metrics.reduce()
    assert figures["context/share"] == 1.0
    assert figures["leakage/kl_right"] != pytest.approx(figures["leakage/kl_shuffled"], abs=1e-3)
    loader.policy.publish(Whole(loader.line.teacher.hf.state_dict()), 1)
    assert "leakage/kl_right" not in loader.batch(1).metrics.reduce()
    loader.close()


def test_the_live_teacher_follows_the_student_and_the_fixed_one_does_not():
    question = [ScoreRequest((4, 5, 6), (7, 8))]
    for weights, follows in (("fixed", False), ("ema", True), ("live", True)):
        loader = opened(settings(teacher=f"teacher={{backend: self, weights: {weights}, decay: 0.5}}"))
        before = loader.line.teacher.score(question, Signal())[0].logprobs
        moved = {name: value + 0.01 for name, value in loader.line.teacher.hf.state_dict().items()}
        loader.publish(Whole(moved), 1)
        after = loader.line.teacher.score(question, Signal())[0].logprobs
        assert (after != pytest.approx(before, abs=1e-6)) is follows
        loader.close()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("teacher=null",), "teacher.backend: is none, but algorithm.name opsd imitates one"),
        (
            ("teacher=null", "algorithm.leakage_every=1"),
            "teacher.backend: is none, but algorithm.name opsd imitates one",
        ),
        (("teacher={backend: self, weights: ema, scorer: policy_server}",), "set teacher.weights: live"),
        (
            (
                "teacher={backend: self, weights: live, scorer: policy_server}",
                "algorithm.divergence={tier: top_k, k: 5}",
            ),
            "but rollout.backend is hf",
        ),
        (("algorithm.context.template=x",), "expected a template with {prompt}"),
        (("algorithm.context.reference=x",), "expected a template with {text}"),
        (("algorithm.context.drop='('",), "expected a regular expression"),
        (("algorithm.context.reference=null", "algorithm.leakage_every=1"), "there is no hint"),
        (("data.path=x.jsonl",), "data.privileged_column: is null"),
        (
            ("algorithm.leakage_every=1", "rollout.temperature=1.5"),
            "algorithm.leakage_every: is 1, but teacher.temperature is 1.0 and rollout.temperature 1.5",
        ),
    ],
)
def test_each_contradiction_is_one_line(overrides, line):
    with pytest.raises(ConfigError) as caught:
        settings(*overrides)
    assert len(caught.value.lines) == 1 and line in caught.value.lines[0], caught.value.lines


def test_a_part_that_is_set_keeps_the_other_defaults_of_its_place():
    """opsd's divergence stays a forward KL with a cap, whichever other keys of it a config sets."""
    assert settings("algorithm.divergence.k=7").algorithm.divergence == OPSD.Options(name="opsd").divergence.model_copy(
        update={"k": 7}
    )


def test_diagnose_names_are_the_same_without_any_context():
    sdpo = SDPO(settings(name="sdpo", options="group_size: 2"))
    meter = MetricAccumulator()
    groups = [sdpo.advantages(attempts(0.0, 0.0))]
    asyncio.run(sdpo.diagnose(groups, groups, None, 0, meter))
    assert meter.reduce() == {"context/share": 0.0}
