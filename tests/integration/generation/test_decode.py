"""`decode` draws what its plain form draws (benchmarks/decode_reference.py), however it saves time."""

import numpy as np
import pytest
import torch
from decode_reference import plain_decode, plain_draw
from families import VOCABULARY, tiny_config
from transformers import AutoModelForCausalLM, DynamicCache

from rlkd.generation.hf import decode, draw
from rlkd.generation.row_cache import ROOM, holds_rows

pytestmark = pytest.mark.long

WINDOWED, NO_ROWS = ("gemma2", "mistral"), ("falcon_h1", "qwen3_5_text")
FAMILIES = ("llama", "qwen3", "falcon", "opt", *WINDOWED, *NO_ROWS)
LENGTHS = (13, 13, 4, 21, 21, 21, 4, 1)
"""Lengths of the prompts; those of one length are equal, two are not beside each other."""
LONGEST = 3 * ROOM
ENDS = tuple(range(5, 95, 10))


@pytest.fixture(autouse=True)
def one_thread():
    """As in `make test`: with two, sums have another order, and one of these log-probs differs by 1.1e-5."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(family, **changes):
    """A tiny model whose weights have a large spread, so that a wrong mask, position or row shows."""
    settings = tiny_config(family)
    for name, value in changes.items():
        setattr(settings, name, value)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    return hf


def prompts(lengths=LENGTHS):
    return [[2 + (7 * n + 3 * t) % 90 for t in range(n)] for n in lengths]


def noise(longest=LONGEST):
    return np.random.default_rng(3).random((len(LENGTHS), longest))


def assert_equal(fast, plain):
    assert [(c.token_ids, c.finish_reason) for c in fast] == [(c.token_ids, c.finish_reason) for c in plain]
    for a, b in zip(fast, plain, strict=True):
        assert np.abs(np.subtract(a.logprobs, b.logprobs)).max() < 1e-5
        assert (a.top_ids is None) == (b.top_ids is None)
        assert a.top_ids is None or torch.equal(a.top_ids, b.top_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_padded_prompts_whose_rows_end_at_different_times(family):
    hf = model(family)
    assert holds_rows(DynamicCache(config=hf.config)) == (family not in NO_ROWS)
    plain = plain_decode(hf, VOCABULARY, prompts(), noise(), 1.0, ENDS)
    assert len({len(c.token_ids) for c in plain}) > 3
    assert_equal(decode(hf, VOCABULARY, prompts(), noise(), 1.0, ENDS), plain)


@pytest.mark.parametrize("family", ["llama", *WINDOWED, *NO_ROWS])
def test_completions_that_outgrow_the_buffers(family):
    """Few tokens end a completion, so that rows leave before and after the buffers have been made larger."""
    hf, ends = model(family), ENDS[:3]
    plain = plain_decode(hf, VOCABULARY, prompts(), noise(), 1.0, ends)
    lengths = sorted(len(c.token_ids) for c in plain)
    assert lengths[1] < LONGEST and lengths[-2] > ROOM + 8
    assert_equal(decode(hf, VOCABULARY, prompts(), noise(), 1.0, ends), plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon_h1"])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 1), (0.7, 5)])
def test_greedy_at_other_temperatures_and_with_the_likeliest_tokens(family, temperature, top_k):
    hf = model(family)
    plain, fast = (
        how(hf, VOCABULARY, prompts(), noise(longest=12), temperature, ENDS, top_k) for how in (plain_decode, decode)
    )
    assert_equal(fast, plain)


@pytest.mark.parametrize("top_k", [0, 3])
def test_tokens_drawn_for_a_part_of_the_rows_at_a_time_are_the_same(monkeypatch, top_k):
    whole = decode(model("llama"), VOCABULARY, prompts(), noise(longest=12), 1.0, ENDS, top_k)
    monkeypatch.setattr("rlkd.generation.hf.DRAW_LOGITS", 2 * VOCABULARY + 1)
    parts = decode(model("llama"), VOCABULARY, prompts(), noise(longest=12), 1.0, ENDS, top_k)
    assert [(c.token_ids, c.logprobs) for c in parts] == [(c.token_ids, c.logprobs) for c in whole]
    assert all(top_k == 0 or torch.equal(a.top_ids, b.top_ids) for a, b in zip(parts, whole, strict=True))


def test_only_the_tokens_of_the_vocabulary_are_drawn_and_no_end_is_above_it():
    hf, ends = model("llama"), (5, 15, 80, 96)
    plain, fast = (how(hf, 60, prompts(), noise(), 1.0, ends) for how in (plain_decode, decode))
    assert_equal(fast, plain)


@pytest.mark.parametrize("longest", [1, 2])
def test_all_rows_end_in_one_step(longest):
    """At once, and after the rows have been repeated."""
    hf, ends = model("llama"), range(VOCABULARY)
    last = ends if longest == 1 else ()
    plain, fast = (how(hf, VOCABULARY, prompts(), noise(longest=longest), 1.0, last) for how in (plain_decode, decode))
    assert_equal(fast, plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon_h1"])
def test_a_prompt_that_occurs_several_times_is_read_once_if_the_cache_can_be_repeated(family):
    hf, read = model(family), []
    hf.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    decode(hf, VOCABULARY, prompts(), noise(longest=3), 1.0, ())
    distinct = len(LENGTHS) if family in NO_ROWS else len(set(LENGTHS))
    assert read == [distinct * max(LENGTHS), len(LENGTHS), len(LENGTHS)]


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon_h1"])
def test_rows_that_have_ended_leave_the_batch_if_the_cache_allows_it(family):
    hf, rows = model(family), []
    completions = decode(hf, VOCABULARY, prompts(), noise(), 1.0, ENDS)
    hf.get_input_embeddings().register_forward_pre_hook(lambda _, given: rows.append(given[0].numel()))
    assert decode(hf, VOCABULARY, prompts(), noise(), 1.0, ENDS) == completions
    lengths = [len(c.token_ids) for c in completions]
    going_on = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert rows[1:] == ([len(LENGTHS)] * len(going_on) if family in NO_ROWS else going_on)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_draws_are_those_of_the_log_softmax(temperature):
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(500, 300, generator=generator, dtype=torch.float64)
    logits[:, 7] = -torch.inf
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw(logits, uniforms, temperature)
    plain_tokens, plain_logprobs = plain_draw(logits, uniforms, temperature)
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logprobs, plain_logprobs, atol=1e-12, rtol=0)
