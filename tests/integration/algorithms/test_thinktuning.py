"""ThinkTuning: the feedback, the rollouts to which it is appended, and the loss on it."""

import asyncio
import copy
import functools
import math
from collections import Counter
from dataclasses import replace

import builders
import pytest
import torch
from builders import Captured, own_logprobs, scored, with_scores

from rlkd.algorithms import feedback
from rlkd.algorithms.feedback import parse
from rlkd.algorithms.feedback_options import PATTERN, FeedbackConfig
from rlkd.algorithms.thinktuning import ThinkTuning
from rlkd.builtin import tokenizer
from rlkd.config_file import ConfigError, load
from rlkd.data.chat import filled, load_tokenizer
from rlkd.distributed import RunStopped
from rlkd.losses import importance_weights
from rlkd.metrics import MetricAccumulator
from rlkd.models.logprob_head import PolicyOutput
from rlkd.models.student import load_causal_lm
from rlkd.models.weights import Whole
from rlkd.pipeline.collate import collate
from rlkd.pipeline.loader import RolloutLoader
from rlkd.types import Completion, Prompt, Rollout, ScoredRollout, Segment, VersionSpan

TOK = load_tokenizer("builtin:student")
EOS = TOK.eos_token_id
GOOD = "no; wait, a slip; so: cba"


def config(*overrides):
    always = ("rollout.max_mismatch=1000.0", "algorithm.group_size=4", "optim.max_grad_norm=1000000.0")
    return load(["configs/thinktuning_tiny.yaml"], [*always, *overrides]).config


def ids(text):
    return tuple(TOK.encode(text))


def sampled(text="cbb", *, word="abc", ended=True, name="p", version=0):
    tokens = ids(text) + ((EOS,) if ended else ())
    message = {"role": "user", "content": f"reverse: {word}"}
    return Rollout(
        prompt=Prompt(id=name, messages=(message,), token_ids=ids(f"reverse: {word}"), answer=word[::-1]),
        token_ids=tokens,
        logprobs=tuple(-0.5 - t for t in range(len(tokens))),
        weight_versions=(VersionSpan(start=0, end=len(tokens), version=version),),
        finish_reason="stop" if ended else "length",
    )


class Student:
    """A sampler that returns the given completions for every prompt."""

    def __init__(self, *rollouts):
        self.rollouts = rollouts

    def sample(self, prompts, *, n, iteration, sampling):
        return [[replace(r, prompt=prompt) for r in self.rollouts] for prompt in prompts]


class Scripted:
    """A teacher that always writes the same text, and records its questions."""

    def __init__(self, text=GOOD, ended=True):
        self.answer = Completion(
            token_ids=ids(text) + ((EOS,) if ended else ()),
            logprobs=(0.0,) * (len(ids(text)) + ended),
            finish_reason="stop" if ended else "length",
        )
        self.asked = []

    def write(self, questions, sampling, iteration):
        self.asked.append((questions, sampling))
        return [self.answer] * len(questions)


def rolled(algorithm, rollouts, teacher, iteration=0, names=("p",)):
    prompts = [replace(rollouts[0].prompt, id=name) for name in names]
    return builders.rolled(algorithm, prompts, Student(*rollouts), teacher, iteration)


def notes(groups):
    return Counter(rollout.note for group in groups for rollout in group if rollout.note)


def guided(group):
    return [bool(r.segments) for r in group]


# ---- what is appended --------------------------------------------------------------------------------------------


def test_golden_augmentation():
    algorithm, teacher = ThinkTuning(config()), Scripted()
    ((made,),) = rolled(algorithm, [sampled("cbb")], teacher)
    assert TOK.decode(made.token_ids) == "cbb wait, a slip so: cba<eos>"
    assert made.segments == (
        Segment(start=0, end=3, author="student"),
        Segment(start=3, end=4, author="glue"),
        Segment(start=4, end=16, author="teacher"),
        Segment(start=16, end=17, author="glue"),
        Segment(start=17, end=24, author="teacher"),
        Segment(start=24, end=25, author="teacher"),
    )
    assert made.logprobs == (-0.5, -1.5, -2.5) + (None,) * 22
    assert made.weight_versions == (VersionSpan(start=0, end=3, version=0),)
    assert made.finish_reason == "stop"
    ((questions, sampling),) = teacher.asked
    assert [TOK.decode(q.prompt) for q in questions] == ["<user>reverse: abc answer: cbb<assistant>"]
    assert (sampling.temperature, sampling.max_tokens) == (0.0, 36)


def test_the_students_token_ids_are_never_encoded_again_from_text():
    """Here one is <unk>, which cannot be recovered from text."""
    odd = sampled()
    odd = replace(odd, token_ids=(TOK.unk_token_id, *odd.token_ids[1:]))
    ((made,),) = rolled(ThinkTuning(config()), [odd], Scripted())
    assert made.segments and made.token_ids[:3] == odd.token_ids[:3]


def test_a_span_with_only_an_end_of_sequence_is_dropped():
    spans = (VersionSpan(start=0, end=3, version=0), VersionSpan(start=3, end=4, version=1))
    made = feedback.append(replace(sampled(), weight_versions=spans), [("teacher", ids("x"))])
    assert made.weight_versions == spans[:1]


@pytest.mark.parametrize(
    ("teacher", "failure"),
    [
        (Scripted("no, wait, a slip; so: cba"), "format"),
        (Scripted(GOOD + " and more"), "format"),
        (Scripted(GOOD, ended=False), "format"),
        (Scripted("no; wait, a slip; so: " + 60 * "a"), "budget"),
    ],
)
def test_what_cannot_be_appended_leaves_the_plain_rollout(teacher, failure):
    algorithm, plain = ThinkTuning(config()), sampled()
    assert rolled(algorithm, [plain], teacher) == [[replace(plain, note=failure)]]


def test_the_budget_is_checked_to_the_token():
    plain = sampled()  # 4 tokens; 25 with the feedback
    ((made,),) = rolled(ThinkTuning(config("algorithm.max_augmented_tokens=25")), [plain], Scripted())
    assert len(made.token_ids) == 25
    ((left,),) = rolled(ThinkTuning(config("algorithm.max_augmented_tokens=24")), [plain], Scripted())
    assert left == replace(plain, note="budget")


def test_a_question_that_is_too_long_is_not_asked():
    teacher, algorithm = Scripted(), ThinkTuning(config("algorithm.feedback.max_prompt_tokens=25"))
    groups = rolled(algorithm, [sampled()], teacher)
    assert guided(groups[0]) == [False]
    assert not teacher.asked and notes(groups) == {"budget": 1}


def test_a_text_that_spells_an_end_of_sequence_is_refused():
    tok = tokenizer.build()
    tok.add_tokens(["<", ">"])
    options = FeedbackConfig(pattern="(?P<reason>.*);(?P<phrase>.*)", glue=" ")
    letters = tok.convert_tokens_to_ids
    for word, wanted in (("<eos>", "format"), ("<eos", None)):
        answer = Completion(
            token_ids=tuple(letters([*"a;", *word, "<eos>"])), logprobs=(0.0,) * (3 + len(word)), finish_reason="stop"
        )
        made = feedback.answered(options, tok, sampled(), answer, 99)
        assert made == wanted if wanted else isinstance(made, Rollout)


# ---- to which rollouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "at_least", "ended", "count"),
    [
        (0.1, 1, 5, 1),
        (0.1, 0, 5, 0),
        (0.5, 1, 5, 2),
        (0.29, 1, 100, 29),
        (1.0, 1, 3, 3),
        (0.1, 4, 2, 2),
        (0.5, 1, 0, 0),
    ],
)
def test_how_many_get_feedback(share, at_least, ended, count):
    settings = (f"algorithm.guided={share}", f"algorithm.at_least={at_least}", "algorithm.max_augmented_tokens=200")
    rollouts = [sampled() for _ in range(ended)] + [sampled(ended=False)] * 2
    (group,) = rolled(ThinkTuning(config(*settings)), rollouts, Scripted())
    assert sum(guided(group)) == count
    assert not any(guided(group)[ended:])


def test_the_choice_is_a_function_of_seed_iteration_and_prompt():
    def chosen(seed, iteration, names=("a", "b")):
        algorithm = ThinkTuning(config(f"run.seed={seed}", "algorithm.guided=0.3"))
        return [guided(g) for g in rolled(algorithm, [sampled() for _ in range(12)], Scripted(), iteration, names)]

    first = chosen(0, 0)
    assert chosen(0, 0) == first and chosen(0, 0, ("b", "a")) == first[::-1]
    assert first[0] != first[1] and chosen(0, 1) != first and chosen(1, 0) != first


def test_below_the_threshold_the_teacher_is_not_asked():
    schedule = "algorithm.guided={kind: linear, start: 0.1, end: 0.0, over: 10}"
    algorithm, teacher = ThinkTuning(config(schedule, "algorithm.off_below=0.06")), Scripted()
    asked = []
    for iteration in range(12):
        teacher.asked.clear()
        (group,) = rolled(algorithm, [sampled(), sampled()], teacher, iteration)
        assert any(guided(group)) == bool(teacher.asked)
        asked.append(bool(teacher.asked))
    assert asked == [True] * 4 + [False] * 8


# ---- templates and their reading ---------------------------------------------------------------------------------


def test_filling_in_is_one_pass_and_leaves_other_braces():
    template = r"{question} \boxed{} {other} {response}"
    assert (
        filled(template, {"question": "{response}?", "response": r"{question} \boxed{1}"})
        == r"{response}? \boxed{} {other} {question} \boxed{1}"
    )


def test_the_default_examples_have_the_default_form():
    options = FeedbackConfig()
    assert [parse(PATTERN, b.feedback) is not None for b in options.behaviours] == [True] * 4
    chat = feedback.chat(options, "Q", "R")
    assert [m["role"] for m in chat] == ["system"] + ["user", "assistant"] * 4 + ["user"]
    assert chat[-1]["content"] == "Question:\nQ\n\nResponse:\nR"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<opinion>correct</opinion>\n<reason> a\nb </reason>\n<phrase>\nc</phrase>\n", ("a\nb", "c")),
        ("<opinion>right</opinion><reason>a</reason><phrase>c</phrase>", None),
        ("<opinion>correct</opinion><reason> </reason><phrase>c</phrase>", None),
        ("<opinion>correct</opinion><reason>a</reason>", None),
        ("x <opinion>correct</opinion><reason>a</reason><phrase>c</phrase>", None),
        ("<opinion>correct</opinion><reason>a</reason><phrase>c</phrase><phrase>d</phrase>", None),
        ("<opinion>correct</opinion><reason>a <phrase>b</phrase></reason><phrase>c</phrase>", None),
    ],
)
def test_the_default_pattern(text, parts):
    found = parse(PATTERN, text)
    assert (found and (found.reason, found.phrase)) == parts


def test_a_question_without_chat_template_and_with_a_system_message_in_the_data():
    options = FeedbackConfig(system=None, behaviours=[], chat_template=False, user="{question} answer: {response}")
    rollout = sampled()
    prompt = replace(rollout.prompt, messages=({"role": "system", "content": "be brief"}, *rollout.prompt.messages))
    asked = feedback.question_ids(options, TOK, replace(rollout, prompt=prompt))
    assert TOK.decode(asked) == "reverse: abc answer: cbb"


def test_a_question_that_the_chat_template_refuses_is_one_line():
    tokenizer = copy.deepcopy(TOK)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(
        RunStopped, match="^prompt '[^\n]*: expected a chat template [^\n]*no system role; change [^\n]*$"
    ):
        feedback.question_ids(FeedbackConfig(), tokenizer, sampled())


# ---- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("teacher=null", "teacher.backend: is none, but algorithm.name thinktuning needs a teacher"),
        ("algorithm.feedback.pattern='('", "algorithm.feedback.pattern: expected a regular expression"),
        (
            "algorithm.feedback.pattern='(?P<reason>a)'",
            "algorithm.feedback.pattern: expected a group named phrase, got '(?P<reason>a)'",
        ),
        ("algorithm.feedback.user='{question}'", "feedback.user: expected a text with {response}, got '{question}'"),
        ("algorithm.shaping=[0.1, 0.0]", "algorithm.shaping: expected 0 <= first <= second, got [0.1, 0.0]"),
        ("algorithm.shaping=[-0.1, 0.0]", "algorithm.shaping: expected 0 <= first <= second, got [-0.1, 0.0]"),
        (
            "trainer.micro_batch_tokens=100",
            "trainer.micro_batch_tokens: is 100, less than one sequence of data.max_prompt_tokens + "
            "algorithm.max_augmented_tokens = 108 tokens",
        ),
    ],
)
def test_contradictions_are_one_line(override, line):
    with pytest.raises(ConfigError) as error:
        config(override)
    assert len(error.value.lines) == 1
    assert line in error.value.lines[0]


def test_without_a_chat_template_there_is_no_chat():
    with pytest.raises(ConfigError, match="algorithm.feedback.chat_template: is false, but system messages"):
        config("algorithm.feedback.chat_template=false", "algorithm.feedback.system=reflect")
    config("algorithm.feedback.chat_template=false")


def test_lengths_for_models_and_servers():
    settings = config()
    algorithm = settings.algorithm
    assert sum(algorithm.trained_lengths(settings).values()) == 32 + 40 + 36
    assert sum(algorithm.teacher_lengths(settings).values()) == 72 + 36
    short = config("algorithm.max_augmented_tokens=10")  # feedback never fits, but plain completions must
    assert sum(short.algorithm.trained_lengths(short).values()) == 32 + 40


# ---- losses ------------------------------------------------------------------------------------------------------


def rows(reason="wait, a slip", phrase="so: cba", advantages=(1.5, -0.5, -0.5, -0.5)):
    parts = [("glue", ids(" ")), ("teacher", ids(reason)), ("glue", ids(" ")), ("teacher", ids(phrase))]
    made = [feedback.append(sampled("cbb"), parts), sampled("cab"), sampled("ccb"), sampled("bbb")]
    return [[ScoredRollout(rollout=r, reward=float(a > 0), advantage=a) for r, a in zip(made, advantages, strict=True)]]


@functools.cache
def captured(rule, *overrides, **changes):
    return Captured(config(f"algorithm.teacher_tokens={rule}", *overrides), collate(rows(**changes), 0))


def distance(a, b):
    return max(float((a.gradients[n] - b.gradients[n]).abs().max()) for n in a.gradients)


def test_others_tokens_have_no_sampler_log_prob_and_importance_weight_one():
    batch = collate(rows(), 0)
    assert batch.sampler_logprobs[0][batch.completion_mask[0]].isnan().sum() == batch.authors[0].ne(0).sum() == 22
    assert torch.equal(
        batch.authors[0].ne(0) & batch.completion_mask[0], batch.completion_mask[0] ^ batch.student_mask[0]
    )
    old = torch.full_like(batch.advantages, -3.0)
    for mode in ("truncate", "mask"):
        weights = importance_weights(old, batch.sampler_logprobs, batch.student_mask, mode, 2.0)
        assert weights[batch.completion_mask ^ batch.student_mask].eq(1).all()
        assert weights[batch.student_mask].ne(1).any()


def test_masked_tokens_change_nothing():
    other = {"reason": "quite others", "phrase": "text: z"}
    assert [len(ids(text)) for text in other.values()] == [
        12,
        7,
    ]  # the same number, otherwise the normaliser would differ
    assert distance(captured("mask"), captured("mask", **other)) == 0
    assert distance(captured("ppo"), captured("ppo", **other)) > 1e-2


def test_ppo_on_the_teachers_tokens_is_reinforce_at_the_start():
    """sft differs from ppo by the advantage, only on these tokens: ppo − mask = A (sft − mask)."""
    ppo, sft, mask = captured("ppo"), captured("sft"), captured("mask")
    assert distance(sft, mask) > 1e-2
    for name in ppo.gradients:
        wanted = mask.gradients[name] + 1.5 * (sft.gradients[name] - mask.gradients[name])
        torch.testing.assert_close(ppo.gradients[name], wanted, atol=1e-5, rtol=1e-4)


def test_shaping_without_gamma_is_ppo_on_policy_and_less_with_it():
    ppo, none = captured("ppo"), captured("shaped", "algorithm.shaping=[0.0, 0.0]")
    some, mask = captured("shaped", "algorithm.shaping=[0.1, 0.1]"), captured("mask")
    assert distance(ppo, none) < 1e-5
    assert 0 < distance(some, mask) < 0.5 * distance(ppo, mask)  # the student finds these tokens unlikely


def test_negative_advantages_sft_none_and_rare_shaped_tokens_as_ppo():
    negative = {"advantages": (-1.5, 0.5, 0.5, 0.5)}
    mask = captured("mask", **negative)
    assert distance(captured("sft", **negative), mask) == 0
    algorithm = ThinkTuning(config("algorithm.teacher_tokens=shaped", "algorithm.shaping=[0.1, 0.1]"))
    batch = collate(rows(**negative), 0)
    batch = batch.weighted(**dict.fromkeys(("policy", "token", "student"), batch.completion_mask.float()))

    def gradient(probability):
        logprobs = torch.full_like(batch.advantages, math.log(probability)).requires_grad_()
        whole = replace(batch, old_logprobs=logprobs.detach())
        algorithm.loss(PolicyOutput(logprobs=logprobs, entropy=torch.zeros_like(logprobs)), whole, 0).total.backward()
        return logprobs.grad[0][batch.authors[0].ne(0)]

    torch.testing.assert_close(gradient(0.009), torch.full((22,), 1.5))
    torch.testing.assert_close(gradient(0.011), torch.full((22,), 1.5 * 0.011 / 0.111))


def test_the_glue_may_have_its_own_loss():
    same, apart = captured("ppo"), captured("ppo", "algorithm.glue_tokens=mask")
    assert distance(same, captured("ppo", "algorithm.glue_tokens=ppo")) == 0
    assert distance(same, apart) > 1e-3
    all_masked = captured("mask", "algorithm.glue_tokens=sft")
    assert distance(all_masked, captured("mask")) > 1e-3


def test_metrics_of_an_iteration():
    algorithm = ThinkTuning(config())
    failed = rolled(algorithm, [sampled()], Scripted("no, a slip"), names=("p", "q"))
    drawn = [[ScoredRollout(rollout=r, reward=None) for r in group] for group in failed]
    meter = MetricAccumulator()
    asyncio.run(algorithm.diagnose([*rows(), [scored(1, 3, None)]], drawn, None, 0, meter))
    wanted = {"fraction": 0.2, "reward": 1.0, "plain_reward": 0.0, "format_failures": 2, "budget_failures": 0}
    assert meter.reduce() == {f"guided/{name}": value for name, value in wanted.items()}
    nobody, everybody = MetricAccumulator(), MetricAccumulator()
    for groups, meter in (([[scored(1, 3, 1.0)]], nobody), ([rows()[0][:1]], everybody)):
        asyncio.run(algorithm.diagnose(groups, groups, None, 0, meter))
    assert nobody._means.keys() == everybody._means.keys()  # all ranks reduce the same names


def test_the_overlong_penalty_does_not_count_the_teachers_tokens():
    """The limit of a plain completion is 40 tokens, with feedback 76; the penalty acts on the last 8."""
    algorithm = ThinkTuning(config("algorithm.overlong_cache=8", "algorithm.normalise=false"))
    parts = [("teacher", ids("x" * 56))]
    long = feedback.append(sampled("cbb"), parts)
    longer = feedback.append(sampled("cbb"), [("teacher", ids("x" * 68))])
    plain = replace(sampled("c" * 35), finish_reason="stop")
    rollouts = [long, longer, plain, sampled("cba")]
    assert [len(r.token_ids) for r in rollouts] == [60, 72, 36, 4]
    group = algorithm.advantages([ScoredRollout(rollout=r, reward=1.0) for r in rollouts])
    shaped = torch.tensor([1.0, 0.5, 0.5, 1.0])
    assert [s.advantage for s in group] == pytest.approx((shaped - shaped.mean()).tolist())


def test_dr_grpo_divides_by_the_budget_of_a_completion_with_feedback():
    assert ThinkTuning(config()).longest_completion == 76
    assert ThinkTuning(config("algorithm.max_augmented_tokens=10")).longest_completion == 40
    short, long = (
        captured("ppo", "algorithm.reduction=dr_grpo", f"algorithm.max_augmented_tokens={n}") for n in (50, 100)
    )
    for name, gradient in short.gradients.items():
        torch.testing.assert_close(gradient, 2 * long.gradients[name], atol=1e-6, rtol=1e-5)


def test_the_kl_to_the_reference_is_measured_on_the_students_tokens():
    """Tokens by the teacher are no samples for an estimate of KL(π‖·)."""
    settings = config("algorithm.reference_coef=1")
    batch = collate(rows(), 0)
    own = own_logprobs(settings, batch)
    measured = []
    for elsewhere in (0.0, -3.0):
        reference = torch.where(batch.student_mask, own - 1.0, own + elsewhere)
        fresh = replace(with_scores(batch, "reference", logprobs=reference), sampler_logprobs=own)
        measured.append(Captured(settings, fresh).row["reference/kl"])
    assert measured == pytest.approx([math.exp(-1.0)] * 2, rel=1e-4)  # k3 at log T − log π = −1: e^−1 + 1 − 1


# ---- the whole line ----------------------------------------------------------------------------------------------


@pytest.fixture
def loader():
    settings = config("rollout.prompts=4", "log.rollouts_every=0")
    loader = RolloutLoader(settings, ThinkTuning(settings))
    loader.open()
    student = load_causal_lm("builtin:mentor", torch.float32, attention=None, trust_remote_code=False)
    loader.publish(Whole(student.state_dict()), 0)
    yield loader
    loader.close()


def test_rewards_are_the_augmented_answers(loader):
    prompts = loader.line.prompts.take(0, 4, 0, 1)
    rollouts = builders.rolled(loader.algorithm, prompts, loader.policy, loader.line.teacher)
    groups = loader.line.stream.run([loader.line.reward(group) for group in rollouts])
    groups = loader.line.stream.run([loader.line.score(group) for group in groups])
    made = [s for group in groups for s in group if s.rollout.segments]
    assert len(made) == 4 and not notes(rollouts)
    assert [s.teacher for s in made] == [None] * 4
    for s in made:
        text = loader.algorithm.text(s.rollout)
        assert "wait, " in text
        assert s.reward == float(text.rsplit("so: ", 1)[1] == s.rollout.prompt.answer)
    assert sum(s.reward for s in made) >= 3


def test_batches_are_a_function_of_seed_and_iteration(loader):
    first, again = loader.batch(0), loader.batch(0)
    assert first.authors.ne(0).any()
    for name in ("input_ids", "authors", "advantages", "rewards"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
