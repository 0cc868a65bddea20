"""Log-probs of chosen tokens only."""

import pytest
import torch
from transformers import LlamaConfig

from rlkd.losses.lm_head import OutputLayer
from rlkd.models.logprob_head import token_logprobs

ROWS, COLUMNS, WIDTH, VOCABULARY = 3, 7, 8, 11
CONFIG = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=1, num_key_value_heads=1)


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, COLUMNS, WIDTH, generator=generator, requires_grad=True)
    ids = torch.randint(VOCABULARY, (ROWS, COLUMNS), generator=generator)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    mask = torch.rand(ROWS, COLUMNS, generator=generator) < 0.5
    mask[:, 0] = False
    return hidden, ids, head, mask


def computed(hidden, ids, head, mask):
    return token_logprobs(hidden, head, ids, temperature=0.7, config=CONFIG, mask=mask, entropy=True)


def test_tokens_under_the_mask_get_what_they_get_without_one(made):
    hidden, ids, head, mask = made
    for all_of_them, chosen in zip(computed(hidden, ids, head, None), computed(hidden, ids, head, mask), strict=True):
        torch.testing.assert_close(chosen, torch.where(mask, all_of_them, 0.0), atol=1e-6, rtol=0)
    slopes = []
    for used in (None, mask):
        logprobs, entropy = computed(hidden, ids, head, used)
        total = torch.where(mask, logprobs + entropy, 0.0).sum()
        slopes.append(torch.autograd.grad(total, [hidden, head.weight]))
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_an_empty_mask_still_has_a_backward(made):
    """A rank without tokens takes part in the collectives of the others' backward, with gradients of zero."""
    hidden, ids, head, mask = made
    logprobs, _ = computed(hidden, ids, head, torch.zeros_like(mask))
    slopes = torch.autograd.grad((logprobs * 0.0).sum(), [hidden, head.weight])
    assert all(not slope.any() for slope in slopes)


def test_an_fp32_head_in_half_precision_is_nearer_to_the_exact_log_probs():
    """Of the same bf16 states and weight, in fp64. Logits of 20 have a spacing of 0.125 in bf16."""
    generator = torch.Generator().manual_seed(0)
    wide = 4096
    hidden = torch.randn(4, 33, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(wide, 64, generator=generator).bfloat16().requires_grad_()
    ids = torch.randint(wide, (4, 33), generator=generator)
    config = LlamaConfig(vocab_size=wide, hidden_size=64, num_attention_heads=1, num_key_value_heads=1)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = (exact_hidden[:, :-1] @ exact_weight.T / 0.7).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    exact_slopes = torch.autograd.grad(exact.sum(), [exact_hidden, exact_weight])
    errors = {}
    for fp32 in (False, True):
        head = OutputLayer(weight=weight, bias=None, fp32=fp32)
        logprobs, _ = token_logprobs(hidden, head, ids, temperature=0.7, config=config)
        slopes = torch.autograd.grad(logprobs.sum(), [hidden, weight])
        assert [slope.dtype for slope in slopes] == [torch.bfloat16] * 2
        errors[fp32] = [float((logprobs[:, 1:] - exact).abs().mean())]
        errors[fp32] += [float((a - b).abs().mean()) for a, b in zip(slopes, exact_slopes, strict=True)]
    print("log-probs, gradients of states and weight, without and with:", errors[False], errors[True])
    assert errors[True][0] < 1e-5 < 1e-2 < errors[False][0]
    assert errors[True][1] < errors[False][1] and errors[True][2] < errors[False][2]


def test_the_sampler_rounds_its_logits_as_the_trainer_does():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (9, 300))
    for fp32, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        raw = OutputLayer(weight=weight, bias=None, fp32=fp32).sampled_from(hidden)
        assert raw.dtype == dtype
        torch.testing.assert_close(raw, (hidden.float() @ weight.float().T).to(dtype))
