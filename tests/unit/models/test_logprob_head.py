"""Log-probs of chosen tokens only."""

import pytest
import torch
from transformers import LlamaConfig

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
