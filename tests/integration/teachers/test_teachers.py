"""Teachers in this process against a plain forward pass, and the parity check that finds a wrong one."""

import dataclasses
from functools import partial

import pytest
import torch
from builders import config, local_scorer

from rlkd.algorithms.kdrl import KDRL
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampling
from rlkd.models.student import load_causal_lm
from rlkd.models.weights import Weights, Whole
from rlkd.pipeline.build import build_reference, build_sampler, build_teacher
from rlkd.pipeline.collate import collate
from rlkd.pipeline.loader import RolloutLoader
from rlkd.teachers.parity import check_parity
from rlkd.teachers.routed import RoutedTeacher
from rlkd.teachers.self_teacher import SelfTeacher
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Prompt, ScoredRollout, Signal, TeacherScores, written

QUESTIONS = [
    ScoreRequest((4, 20, 9, 11), (7, 8, 1)),
    ScoreRequest((4, 20), (12, 12, 9, 30, 1)),
    ScoreRequest((4, 5, 6, 7, 8, 9, 10), (3,)),
]


def plain_logprobs(hf, prompt, completion, temperature):
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logprobs = (hf(ids).logits[0] / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1).tolist()


@pytest.mark.parametrize("temperature", ["1.0", "0.5"])
@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_scores_are_a_plain_forwards_whatever_the_batch(temperature, batch_tokens):
    settings = config(
        f"teacher.temperature={temperature}",
        f"rollout.temperature={temperature}",
        f"teacher.batch_tokens={batch_tokens}",
    )
    teacher = build_teacher(settings, build_sampler(settings))
    teacher.open()
    hf = load_causal_lm("builtin:teacher", torch.float32, attention=None, trust_remote_code=False)
    for question, scores in zip(QUESTIONS, teacher.score(QUESTIONS, Signal()), strict=True):
        wanted = plain_logprobs(hf, question.prompt, question.completion, float(temperature))
        assert scores.logprobs == pytest.approx(wanted, abs=1e-4)


@pytest.fixture
def line():
    """A loader whose sampler has the student's initial weights."""
    settings = config("rollout.max_mismatch=0.001")
    loader = RolloutLoader(settings, KDRL(settings))  # rollout.backend is hf
    loader.policy.open()
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    loader.policy.publish(Whole(hf.state_dict()), 0)
    return loader, hf


def test_the_student_scores_its_own_samples_as_its_sampler_did(line):
    loader, _ = line
    start = build_reference(loader.config)
    start.open()
    gaps = check_parity(loader.config, loader.line.prompts.take(0, 8), loader.policy, start, None)
    assert gaps["student as teacher"] < 1e-4


def test_parity_finds_a_sampler_with_other_weights(line):
    loader, hf = line
    loader.policy.publish(Whole({n: v * 1.01 for n, v in hf.state_dict().items()}), 0)
    start = build_reference(loader.config)
    start.open()
    with pytest.raises(RuntimeError, match=r"teacher.check_parity: student as teacher: "):
        check_parity(loader.config, loader.line.prompts.take(0, 8), loader.policy, start, None)


def plain_distribution(hf, question, temperature=1.0):
    """[L, V] log-probs from which each completion token is drawn."""
    ids = torch.tensor([[*question.prompt, *question.completion]])
    with torch.no_grad():
        return (hf(ids).logits[0, len(question.prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [16, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_top_k_is_a_plain_forwards(temperature, batch_tokens):
    teacher = local_scorer(temperature=temperature, batch_tokens=batch_tokens)
    for k in (5, 1000):  # the vocabulary has 56
        for question, scores in zip(QUESTIONS, teacher.score(QUESTIONS, Signal(tier="top_k", k=k)), strict=True):
            truth = plain_distribution(teacher.hf, question, temperature)
            wanted = truth.topk(min(k, 56))
            torch.testing.assert_close(scores.top_logprobs, wanted.values, atol=1e-4, rtol=0)
            torch.testing.assert_close(truth.gather(1, scores.top_ids), wanted.values, atol=1e-4, rtol=0)
            chosen = plain_logprobs(teacher.hf, question.prompt, question.completion, temperature)
            assert scores.logprobs == pytest.approx(chosen, abs=1e-4)
            assert scores.hidden is None


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_given_tokens_are_scored_as_by_a_plain_forward(temperature):
    teacher = local_scorer(temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randint(0, 56, (len(q.completion), 4), generator=generator) for q in QUESTIONS]
    given[1][0, 2], given[1][1, 3] = -1, 60  # padding, and a student's embedding row that the teacher lacks
    questions = [dataclasses.replace(q, ids=ids) for q, ids in zip(QUESTIONS, given, strict=True)]
    for question, ids, scores in zip(questions, given, teacher.score(questions, Signal(tier="given")), strict=True):
        truth = plain_distribution(teacher.hf, question, temperature)
        has = (ids >= 0) & (ids < 56)
        assert torch.equal(scores.top_ids, torch.where(has, ids, -1))
        wanted = truth.gather(1, ids.masked_fill(~has, 0)).masked_fill(~has, -torch.inf)
        torch.testing.assert_close(scores.top_logprobs, wanted, atol=1e-4, rtol=0)
        chosen = plain_logprobs(teacher.hf, question.prompt, question.completion, temperature)
        assert scores.logprobs == pytest.approx(chosen, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_hidden_states_give_the_distribution_through_the_output_layer(batch_tokens):
    teacher = local_scorer(batch_tokens=batch_tokens)
    (layer,) = teacher.layers()
    for question, scores in zip(QUESTIONS, teacher.score(QUESTIONS, Signal(tier="hidden")), strict=True):
        got = layer.logits(scores.hidden, 56).log_softmax(-1)
        torch.testing.assert_close(got, plain_distribution(teacher.hf, question), atol=1e-4, rtol=0)
        assert scores.top_ids is None


def test_a_bf16_teachers_top_k_and_logprobs_are_near():
    """TRL's kernel rounds logits to bf16 before it computes log-probs; the top k use unrounded logits."""
    teacher = local_scorer(dtype=torch.bfloat16)
    for question, scores in zip(QUESTIONS, teacher.score(QUESTIONS, Signal(tier="top_k", k=56)), strict=True):
        chosen = torch.tensor(question.completion)[:, None]
        said = torch.zeros(len(chosen), 56).scatter(1, scores.top_ids, scores.top_logprobs).gather(1, chosen)
        assert scores.logprobs == pytest.approx(said[:, 0].tolist(), abs=0.02)


@pytest.mark.parametrize("tier", ["hidden", "top_k"])
def test_column_t_is_what_the_teacher_predicts_token_t_from_whatever_its_prompt(tier):
    """The student reads one prompt and the teacher a longer or a shorter one; the completion is the same."""
    teacher = local_scorer()
    prompts = [(4, 20, 9), (4, 5, 6, 7, 8, 9), (4, 11)]
    theirs = [(4, 30, 31, 32, 20, 9, 11), (4, 5), (4, 11)]
    completions = [(7, 8, 9, 1), (3, 1), (12, 13, 14, 15, 16, 1)]
    questions = [ScoreRequest(p, c) for p, c in zip(theirs, completions, strict=True)]
    scores = teacher.score(questions, Signal(tier=tier, k=6))
    rows = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        rollout = written(Prompt(id=str(i), messages=(), token_ids=prompt), completion, "data", "stop")
        rows.append(
            ScoredRollout(
                rollout=rollout, reward=None, scores={"teacher": scores[i]}, masks={"kd": (True,) * len(completion)}
            )
        )
    batch = collate([rows], 0, {"teacher": teacher.layers()} if tier == "hidden" else {})
    found = batch.scores["teacher"]
    for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        truth = plain_distribution(teacher.hf, question)
        for t, token in enumerate(question.completion):
            column = len(prompt) + t
            assert batch.input_ids[row, column] == token and batch.masks["kd"][row, column]
            assert float(found.logprobs[row, column]) == pytest.approx(float(truth[t, token]), abs=1e-4)
            if tier == "hidden":
                states = found.hidden[row, column][None]
                got = found.layers[0].logits(states, 56)[0].log_softmax(-1)
                torch.testing.assert_close(got, truth[t], atol=1e-4, rtol=0)
            else:
                ids = found.top_ids[row, column]
                torch.testing.assert_close(truth[t, ids], truth[t].topk(6).values, atol=1e-4, rtol=0)
                torch.testing.assert_close(found.top_logprobs[row, column], truth[t, ids], atol=1e-4, rtol=0)


def test_what_a_narrow_teacher_leaves_free_is_no_token():
    """Lists of 2 and 3 tokens, states of 2 and 3 numbers (in bf16 and fp32) share one tensor."""

    def row(k, dtype):
        rollout = written(Prompt(id=str(k), messages=(), token_ids=(4,)), (7, 1), "data", "stop")
        teacher = TeacherScores(
            logprobs=(-1.0, -1.0),
            top_ids=torch.arange(1, k + 1).expand(2, k),
            top_logprobs=torch.full((2, k), -1.0),
            hidden=torch.full((2, k), 1.0001, dtype=dtype),
        )
        return ScoredRollout(rollout=rollout, reward=None, scores={"teacher": teacher}, masks={"kd": (True, True)})

    batch = collate([[row(2, torch.bfloat16), row(3, torch.float32)]], 0)
    assert batch.scores["teacher"].top_ids[:, 1].tolist() == [[1, 2, -1], [1, 2, 3]]
    assert batch.scores["teacher"].top_logprobs[:, 1].tolist() == [[-1, -1, -torch.inf], [-1, -1, -1]]
    assert batch.scores["teacher"].hidden.dtype == torch.float32
    assert batch.scores["teacher"].hidden[1, 2].tolist() == pytest.approx([1.0001] * 3, abs=1e-6)


@pytest.mark.parametrize(("prompt", "completion"), [((), (7,)), ((4,), ())])
def test_a_question_without_a_prompt_or_a_completion_is_refused(prompt, completion):
    with pytest.raises(ValueError, match=f"got {len(prompt)} and {len(completion)}"):
        local_scorer().score([ScoreRequest((4,), (7,)), ScoreRequest(prompt, completion)], Signal())


GREEDY = Sampling(temperature=0.0, max_tokens=8, seed=3)
HOT = Sampling(temperature=1.5, max_tokens=8, seed=3)
TO_WRITE = [ScoreRequest((4, 20 + i, *range(5, 5 + i % 4)), name=f"q{i}") for i in range(6)]


def test_greedy_writing_takes_the_likeliest_tokens_and_stops_at_the_end():
    teacher = local_scorer()
    for question, completion in zip(TO_WRITE, teacher.write(TO_WRITE, GREEDY, 0), strict=True):
        ids = torch.tensor([question.prompt])
        whole = teacher.hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=1
        )
        assert completion.token_ids == tuple(whole[0, ids.shape[1] :].tolist())
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 1 else "length")


def test_what_a_teacher_writes_is_a_function_of_seed_iteration_and_name():
    wide, narrow = local_scorer(), local_scorer(batch_tokens=1)
    first = wide.write(TO_WRITE, HOT, 7)
    tokens = [c.token_ids for c in first]
    assert [c.token_ids for c in narrow.write(TO_WRITE, HOT, 7)] == tokens
    assert [c.token_ids for c in wide.write(TO_WRITE[4:5], HOT, 7)] == tokens[4:5]
    assert [c.token_ids for c in wide.write(TO_WRITE, HOT, 8)] != tokens
    assert [c.token_ids for c in wide.write(TO_WRITE, dataclasses.replace(HOT, seed=4), 7)] != tokens
    renamed = [dataclasses.replace(q, name=q.name + "x") for q in TO_WRITE]
    assert [c.token_ids for c in wide.write(renamed, HOT, 7)] != tokens
    assert wide.write([], HOT, 7) == []


# ---- several teachers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed():
    return RoutedTeacher("whose", {"small": local_scorer("builtin:student"), "large": local_scorer("builtin:teacher")})


def asked(names, questions):
    return [dataclasses.replace(q, meta={"whose": name}) for q, name in zip(questions, names, strict=True)]


@pytest.mark.parametrize("tier", ["sampled", "top_k", "hidden"])
def test_each_question_goes_to_the_teacher_that_its_data_names(routed, tier):
    signal = Signal(tier=tier, k=4 if tier == "top_k" else 0)
    names = ["large", "small", "large"]
    scores = routed.score(asked(names, QUESTIONS), signal)
    assert [s.teacher for s in scores] == [1, 0, 1]
    assert [layer.weight.shape[1] for layer in routed.layers()] == [64, 128]
    for name, question, got in zip(names, QUESTIONS, scores, strict=True):
        (wanted,) = routed.teachers[name].score([question], signal)
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        if tier == "hidden":
            layer = routed.layers()[got.teacher]
            truth = plain_distribution(routed.teachers[name].hf, question)
            torch.testing.assert_close(layer.logits(got.hidden, 56).log_softmax(-1), truth, atol=1e-4, rtol=0)
        if tier == "top_k":
            torch.testing.assert_close(got.top_logprobs, wanted.top_logprobs, atol=1e-4, rtol=0)


def test_each_teacher_writes_its_own(routed):
    names = ["small", "large"] * 3
    got = routed.write(asked(names, TO_WRITE), HOT, 2)
    for name, question, completion in zip(names, TO_WRITE, got, strict=True):
        assert completion.token_ids == routed.teachers[name].write([question], HOT, 2)[0].token_ids


def test_an_unknown_teacher_is_one_clear_error(routed):
    message = r"teacher.column: expected 'whose' to be one of small, large in every prompt, got 'medium'"
    questions = asked(["small", "medium", "large"], QUESTIONS)
    for ask in (partial(routed.score, signal=Signal()), partial(routed.write, sampling=HOT, iteration=0)):
        with pytest.raises(RunStopped, match=message) as caught:
            ask(questions)
        assert "\n" not in str(caught.value)
    with pytest.raises(RunStopped, match="expected 'whose' to be one of .*, got None"):
        routed.score(QUESTIONS, Signal())


# ---- the student as its own ------------------------------------------------------------------------------------------


def self_teacher(weights, **changes):
    given = {"backend": "self", "weights": weights, "decay": 0.75} | changes
    text = ", ".join(f"{key}: {value}" for key, value in given.items())
    made = SelfTeacher(config(f"teacher={{{text}}}"))
    made.open()
    return made


def state(teacher):
    return {name: value.clone() for name, value in teacher.hf.state_dict().items()}


def moved(weights, by):
    """Other weights, tied like the student's."""
    generator = torch.Generator().manual_seed(1)
    made = {name: value + by * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    return made | {"lm_head.weight": made["model.embed_tokens.weight"]}


def assert_weights(got, wanted, tolerance=0.0):
    assert got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=tolerance)


def test_a_fixed_self_teacher_stays_and_a_live_one_follows():
    fixed, live = self_teacher("fixed"), self_teacher("live")
    start, now = state(fixed), moved(state(fixed), 0.1)
    for teacher in (fixed, live):
        teacher.publish(Weights.of(start), 0)
        teacher.publish(Weights.of(now), 1)
    assert_weights(state(fixed), start)
    assert_weights(state(live), now)
    assert torch.equal(live.layers()[0].weight, now["lm_head.weight"]), "its layer follows too"


def test_the_average_follows_by_one_minus_its_decay():
    teacher = self_teacher("ema")
    start = state(teacher)
    now = moved(start, 0.1)
    teacher.publish(Weights.of(start), 0)
    assert_weights(state(teacher), start)
    teacher.publish(Weights.of(now), 1)
    wanted = {name: 0.75 * start[name] + 0.25 * now[name] for name in start}
    assert_weights(state(teacher), wanted, 1e-6)
    before = state(teacher)
    teacher.publish(Weights.of(moved(start, 5.0)), 1)
    assert_weights(state(teacher), before)  # the same version again changes nothing
    with pytest.raises(AssertionError, match="the average is at version 1, the student at 3"):
        teacher.publish(Weights.of(now), 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_average_continues_bit_for_bit(tmp_path, dtype):
    straight, first = self_teacher("ema", dtype=dtype), self_teacher("ema", dtype=dtype)
    start = {name: value.float() for name, value in state(straight).items()}
    steps = [moved(start, 0.1 * i) for i in range(5)]
    for version, weights in enumerate(steps):
        straight.publish(Weights.of(weights), version)
    for version in (0, 1, 2):
        first.publish(Weights.of(steps[version]), version)
    first.save(tmp_path)
    resumed = self_teacher("ema", dtype=dtype)
    resumed.restore(tmp_path, 2)
    assert_weights(state(resumed), state(first))
    for version in (2, 3, 4):  # a resumed run first publishes the weights it has restored
        resumed.publish(Weights.of(steps[version]), version)
    assert_weights(state(resumed), state(straight))
    scores = [t.score(QUESTIONS, Signal()) for t in (resumed, straight)]
    assert [s.logprobs for s in scores[0]] == [s.logprobs for s in scores[1]]
