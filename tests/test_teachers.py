"""The local scorer against a plain forward, and the parity check that finds a wrong one."""

import pytest
import torch
from builders import config

from rlkd.algorithms import KDRL
from rlkd.rollout.hf import HFSampler
from rlkd.rollout.loader import RolloutLoader, build_reference, build_sampler, build_teacher
from rlkd.rollout.sampler import end_ids
from rlkd.student import load_causal_lm
from rlkd.teachers.parity import check_parity
from rlkd.teachers.teacher import Question
from rlkd.types import Signal

QUESTIONS = [
    Question((4, 20, 9, 11), (7, 8, 1)),
    Question((4, 20), (12, 12, 9, 30, 1)),
    Question((4, 5, 6, 7, 8, 9, 10), (3,)),
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
    """A loader whose sampler holds the student's start."""
    settings = config("rollout.max_mismatch=0.001")
    loader = RolloutLoader(settings, KDRL(settings))
    loader.policy = HFSampler(settings, end_ids(settings.model.path))
    loader.policy.open()
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    loader.policy.publish(hf.state_dict(), 0)
    return loader, hf


def test_the_student_scores_its_own_samples_as_its_sampler_did(line):
    loader, _ = line
    start = build_reference(loader.config)
    start.open()
    gaps = check_parity(loader.config, loader.prompts.take(0, 8), loader.policy, start, None)
    assert gaps["student as teacher"] < 1e-4


def test_parity_finds_a_sampler_with_other_weights(line):
    loader, hf = line
    loader.policy.publish({n: v * 1.01 for n, v in hf.state_dict().items()}, 0)
    start = build_reference(loader.config)
    start.open()
    with pytest.raises(RuntimeError, match=r"teacher.check_parity: student as teacher differ by"):
        check_parity(loader.config, loader.prompts.take(0, 8), loader.policy, start, None)
