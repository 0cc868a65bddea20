"""The in-process sampler: its log-probs are the model's, and its samples do not depend on the rest of the batch."""

import numpy as np
import pytest
import torch
from builders import config, encode_prompt

from rlkd.data.chat import load_tokenizer
from rlkd.generation.hf import HFSampler, draw, uniform
from rlkd.generation.sampler import Sampling, eos_ids
from rlkd.models.student import load_causal_lm
from rlkd.models.weights import Whole
from rlkd.types import Prompt

SAMPLING = Sampling(temperature=1.0, max_tokens=12, seed=5)


def prompts(*lengths):
    """Reversal prompts with words of the given lengths."""
    tokenizer = load_tokenizer("builtin:student", False)
    made = []
    for i, n in enumerate(lengths):
        word = "".join("abcdefghij"[(3 * i + 7 * t) % 10] for t in range(n))
        messages, ids = encode_prompt(tokenizer, f"reverse: {word}", None, True)
        made.append(Prompt(id=f"q{i}", messages=tuple(messages), token_ids=tuple(ids)))
    return made


@pytest.fixture(scope="module")
def hf():
    return load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)


@pytest.fixture(scope="module")
def sampler(hf):
    settings = config()
    made = HFSampler(settings, eos_ids(settings.model.path, False))
    made.open()
    made.publish(Whole(hf.state_dict()), 4)
    return made


def model_logprobs(hf, rollout, temperature):
    ids = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
    with torch.no_grad():
        logprobs = (hf(ids).logits[0].double() / temperature).log_softmax(-1)
    start = len(rollout.prompt.token_ids)
    return logprobs[start - 1 : -1].gather(1, ids[0, start:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models_at_the_temperature_with_prompts_of_unequal_length(sampler, hf, temperature):
    sampling = Sampling(temperature=temperature, max_tokens=12, seed=5)
    for group in sampler.sample(prompts(4, 9, 6), n=4, iteration=0, sampling=sampling):
        for rollout in group:
            wanted = model_logprobs(hf, rollout, temperature)
            assert torch.tensor(rollout.logprobs).sub(wanted).abs().max() < 1e-4


def test_samples_do_not_depend_on_the_rest_of_the_batch(sampler):
    many = prompts(*range(3, 19))
    together = sampler.sample(many, n=4, iteration=2, sampling=SAMPLING)
    alone = [sampler.sample([p], n=4, iteration=2, sampling=SAMPLING)[0] for p in many]
    assert [[r.token_ids for r in g] for g in together] == [[r.token_ids for r in g] for g in alone]


def test_a_group_is_handed_on_when_its_last_completion_ends(sampler):
    """Not when the longest one of the batch does."""
    asked, steps = prompts(9, 3, 6, 12), []
    counted = sampler._model.base_model.register_forward_hook(lambda *_: steps.append(1))
    try:
        arrived = []
        for index, group in sampler.groups(asked, n=2, iteration=0, sampling=SAMPLING):
            longest = max(len(rollout.token_ids) for rollout in group)
            assert len(steps) == longest or len(steps) == SAMPLING.max_tokens
            arrived.append((index, group))
    finally:
        counted.remove()
    assert len({len(r.token_ids) for _, group in arrived for r in group}) > 1
    assert arrived[0][1] != arrived[-1][1] and dict(arrived) == dict(
        enumerate(sampler.sample(asked, n=2, iteration=0, sampling=SAMPLING))
    )


def test_samples_differ_between_iterations_seeds_and_each_other(sampler):
    def drawn(iteration, seed):
        sampling = Sampling(temperature=1.0, max_tokens=12, seed=seed)
        (group,) = sampler.sample(prompts(6), n=8, iteration=iteration, sampling=sampling)
        return [r.token_ids for r in group]

    assert len(set(drawn(0, 5))) > 1
    assert drawn(0, 5) != drawn(1, 5) and drawn(0, 5) != drawn(0, 6)
    assert drawn(0, 5) == drawn(0, 5)


def test_greedy_takes_the_most_likely_token(sampler, hf):
    sampling = Sampling(temperature=0.0, max_tokens=12, seed=0)
    for (rollout,) in sampler.sample(prompts(4, 8), n=1, iteration=0, sampling=sampling):
        ids = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        best = hf(ids).logits[0].argmax(-1)
        assert best[len(rollout.prompt.token_ids) - 1 : -1].tolist() == list(rollout.token_ids)


def test_completions_end_with_the_end_token_or_at_the_budget(sampler):
    ends = set(eos_ids(config().model.path, False))
    for group in sampler.sample(prompts(5, 7), n=16, iteration=0, sampling=SAMPLING):
        for rollout in group:
            if rollout.finish_reason == "stop":
                assert rollout.token_ids[-1] in ends
            else:
                assert len(rollout.token_ids) == SAMPLING.max_tokens
            assert not ends & set(rollout.token_ids[:-1])


def test_the_likeliest_tokens_are_the_models(sampler, hf):
    """They are returned at every position, whatever was sampled, while finished rows leave the batch."""
    sampling = Sampling(temperature=0.7, max_tokens=12, seed=3, top_k=4)
    groups = sampler.sample(prompts(2, 5, 3), n=3, iteration=0, sampling=sampling)
    for rollout in (r for group in groups for r in group):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            truth = hf(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        assert rollout.top_ids.shape == (len(rollout.token_ids), 4)
        torch.testing.assert_close(truth.gather(1, rollout.top_ids), truth.topk(4).values, atol=1e-4, rtol=0)


def test_every_token_carries_the_published_version(sampler):
    (group,) = sampler.sample(prompts(5), n=3, iteration=0, sampling=SAMPLING)
    assert {(s.start, s.version) for r in group for s in r.weight_versions} == {(0, 4)}


def test_publishing_changes_what_is_sampled_and_refuses_partial_weights(sampler, hf):
    before = sampler.sample(prompts(6), n=8, iteration=0, sampling=SAMPLING)
    other = {name: value + 0.05 * torch.randn_like(value) for name, value in hf.state_dict().items()}
    sampler.publish(Whole(other), 5)
    after = sampler.sample(prompts(6), n=8, iteration=0, sampling=SAMPLING)
    assert [r.token_ids for r in before[0]] != [r.token_ids for r in after[0]]
    with pytest.raises(ValueError, match="expected the weights of Llama.*, got a difference in lm_head"):
        sampler.publish(Whole({}), 6)
    sampler.publish(Whole(hf.state_dict()), 4)


@pytest.mark.parametrize(
    ("options", "dtype", "shared"),
    [
        ([], torch.float32, True),
        (["rollout.max_staleness=1"], torch.float32, False),  # samples while the student's weights change
        ([], torch.bfloat16, False),  # a sampler in fp32 needs its own copy
    ],
)
def test_the_published_tensors_are_used_in_place_if_nothing_is_sampled_ahead(hf, options, dtype, shared):
    settings = config(*options)
    sampler = HFSampler(settings, eos_ids(settings.model.path, False))
    sampler.open()
    weights = {name: value.to(dtype, copy=True) for name, value in hf.state_dict().items()}
    sampler.publish(Whole(weights), 0)
    (before,) = sampler.sample(prompts(6), n=8, iteration=0, sampling=SAMPLING)
    for value in weights.values():
        value += 0.05 * torch.randn_like(value)
    (after,) = sampler.sample(prompts(6), n=8, iteration=0, sampling=SAMPLING)
    assert ([r.token_ids for r in before] != [r.token_ids for r in after]) == shared


def test_draws_follow_the_distribution():
    """20,000 draws from 4 tokens: every frequency within 4 standard deviations of its probability."""
    logits = torch.tensor([0.1, 2.0, -1.0, 0.5], dtype=torch.float64)
    uniforms = torch.as_tensor(np.random.Generator(np.random.Philox(0)).random(20_000))
    tokens, _ = draw(logits.expand(20_000, 4), uniforms, 1.0)
    p = logits.softmax(0)
    frequency = torch.bincount(tokens, minlength=4) / 20_000
    assert ((frequency - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()


def test_the_ends_of_the_noise_stay_inside_the_vocabulary():
    logits = torch.zeros(2, 3, dtype=torch.float64)
    tokens, _ = draw(logits, torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [0, 2]


def test_noise_is_a_function_of_its_names():
    a = uniform(SAMPLING, 0, "p", 0)
    assert (a == uniform(SAMPLING, 0, "p", 0)).all() and len(a) == 12
    assert all((a != uniform(SAMPLING, *names)).any() for names in ((1, "p", 0), (0, "q", 0), (0, "p", 1)))
