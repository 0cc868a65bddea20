"""A divergence over the full vocabulary, computed by formula, is the one that autograd gives."""

import dataclasses
import math

import pytest
import torch
from divergence_reference import PLAIN, batch_of, gradients, normal
from transformers import CohereConfig, Gemma2Config

from rlkd.losses import divergence_slopes
from rlkd.losses.lm_head import OutputLayer
from rlkd.models import logprob_head
from rlkd.models.logprob_head import ByProducts, DivergenceSpec, teacher_divergence, token_logprobs

B, T, V, H, H_TEACHER = 3, 6, 11, 7, 5
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
CONFIGS = {
    "plain": PLAIN,
    "scale": CohereConfig(logit_scale=0.25),
    "softcap": Gemma2Config(final_logit_softcapping=2.0),
}


def weights_of_tokens(dtype=torch.float64):
    weights = torch.zeros(B, T, dtype=dtype)
    weights[0, 2:6], weights[1, 1:4], weights[2, 5] = 0.1, 0.25, -0.5
    return weights


def ratios_of_tokens():
    """Some are 0, as where a ratio is capped from below: the token is computed and must not count."""
    ratios = torch.linspace(0.5, 2.0, B * T, dtype=torch.float64).view(B, T)
    ratios[0, 3] = ratios[1, 1] = 0.0
    return ratios


def head(vocabulary=V, dtype=torch.float64):
    made = torch.nn.Linear(H, vocabulary, dtype=dtype)
    made.weight.data, made.bias.data = normal(0, vocabulary, H).to(dtype), normal(1, vocabulary).to(dtype)
    return made


def layer(vocabulary=V, **changes):
    return OutputLayer(weight=normal(10, vocabulary, H_TEACHER), bias=normal(11, vocabulary), **changes)


def found(comparison, output, theirs, config=PLAIN, ratios=None, hidden=None, weights=None):
    """The value, the divergence of each token, and the gradients to hidden states and output layer."""
    hidden = (normal(5, B, T, H) if hidden is None else hidden).requires_grad_()
    weights = weights_of_tokens() if weights is None else weights
    batch = batch_of(weights, hidden=normal(20, *weights.shape, H_TEACHER), layers=(theirs,))
    value, per_token = teacher_divergence(hidden, output, batch, comparison, config, ratios)
    return value.detach(), per_token, *gradients(value, hidden, output.weight, output.bias)


def assert_same(got, wanted, tolerance=1e-9):
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def only(way, monkeypatch):
    """Let `teacher_divergence` compute in one way; the other fails."""
    if way == "formula":
        monkeypatch.setattr(logprob_head, "by_autograd", None)
    else:
        monkeypatch.setattr(logprob_head, "ByFormula", None)
        monkeypatch.setattr(logprob_head, "_all_finite", lambda *biases: False)


@pytest.mark.parametrize("blend", [None, 0.3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_both_ways_give_the_same(monkeypatch, kind, beta, clip, config, blend):
    """In three chunks of unequal length, of several tiles each, at a temperature, with a teacher that has fewer tokens
    and a scale and soft cap of its own, and with weights of 0."""
    monkeypatch.setattr(logprob_head, "CHUNK_LOGITS", 3 * V)
    monkeypatch.setattr(divergence_slopes, "TILE_LOGITS", 4 * 3)
    comparison = DivergenceSpec(kind=kind, temperature=0.7, beta=beta, clip=clip, blend=blend)
    inputs = comparison, head(V + 2), layer(scale=1.5, softcap=5.0), config, ratios_of_tokens()
    with monkeypatch.context() as patch:
        only("formula", patch)
        by_formula = found(*inputs)
    with monkeypatch.context() as patch:
        only("autograd", patch)
        by_autograd = found(*inputs)
    assert all(part.abs().max() > 1e-4 for part in by_autograd)
    assert (by_autograd[3][V:] == 0).all(), "the rows beyond the common vocabulary have no gradient"
    assert_same(by_formula, by_autograd)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_log_probs_and_entropies_are_by_products(monkeypatch, kind, beta, config):
    """In several chunks, at a temperature; only of the tokens that have a weight."""
    monkeypatch.setattr(logprob_head, "CHUNK_LOGITS", 3 * V)
    comparison, output = DivergenceSpec(kind=kind, temperature=0.7, beta=beta), head()
    hidden, weights = normal(5, B, T, H), weights_of_tokens()
    batch = batch_of(weights, hidden=normal(20, B, T, H_TEACHER), layers=(layer(),))
    batch = dataclasses.replace(batch, input_ids=torch.arange(B * T).view(B, T) % V)
    known = ByProducts.of(batch)
    teacher_divergence(hidden, output, batch, comparison, config, by_products=known)
    logprobs, entropy = token_logprobs(hidden, output, batch.input_ids, temperature=0.7, config=config, entropy=True)
    mask = weights != 0
    assert torch.equal(known.known, mask)
    torch.testing.assert_close(known.logprobs, torch.where(mask, logprobs, 0.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(known.entropy, torch.where(mask, entropy, 0.0), atol=1e-5, rtol=1e-5)


def test_a_teacher_with_fewer_tokens_leaves_the_student_s_log_probs_to_others():
    """The divergence is over the tokens that both have, the log-probs are over all."""
    batch = batch_of(weights_of_tokens(), hidden=normal(20, B, T, H_TEACHER), layers=(layer(),))
    known = ByProducts.of(batch)
    comparison = DivergenceSpec(kind="reverse_kl", temperature=1.0)
    teacher_divergence(normal(5, B, T, H), head(V + 2), batch, comparison, PLAIN, by_products=known)
    assert not known.known.any()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_tokens_that_both_models_rule_out_are_as_if_they_were_not_there(kind, beta, clip):
    """By a bias of −∞."""
    comparison = DivergenceSpec(kind=kind, temperature=0.7, beta=beta, clip=clip)
    output, theirs, narrow = head(), layer(), torch.nn.Linear(H, 8, dtype=torch.float64)
    narrow.weight.data, narrow.bias.data = output.weight.data[:8], output.bias.data[:8]
    wanted = found(comparison, narrow, layer())
    output.bias.data[8:] = theirs.bias[8:] = -math.inf
    got = found(comparison, output, theirs)
    assert all((part[8:] == 0).all() for part in got[3:])
    assert_same((*got[:3], *(part[:8] for part in got[3:])), wanted)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(("kind", "beta"), [each for each in KINDS if each[0] != "reverse_kl"])
def test_a_bias_of_minus_infinity_in_the_teacher_is_one_that_is_low_enough(kind, beta, clip):
    """KL(S‖T) is infinite there, so it is left out."""
    comparison = DivergenceSpec(kind=kind, temperature=0.7, beta=beta, clip=clip)
    ruled_out, low = layer(), layer()
    ruled_out.bias[8:], low.bias[8:] = -math.inf, -1e4
    assert_same(found(comparison, head(), ruled_out), found(comparison, head(), low))


@pytest.mark.parametrize("tokens", [1, 31, 64, 65, 200])
def test_the_length_of_a_chunk_does_not_matter(monkeypatch, tokens):
    """Also where it is rounded up to a multiple of 32."""
    comparison = DivergenceSpec(kind="reverse_kl", temperature=1.0)
    weights = torch.linspace(0.1, 1.0, 300, dtype=torch.float64).view(2, 150)
    weights[:, 0] = 0.0

    def sums():
        return found(comparison, head(), layer(), hidden=normal(5, 2, 150, H), weights=weights)

    at_once = sums()
    monkeypatch.setattr(logprob_head, "CHUNK_LOGITS", tokens * V)
    assert_same(sums(), at_once)
    assert tokens <= logprob_head._tokens_at_a_time(V, torch.device("cpu")) <= 1.5 * tokens


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_give_the_same_in_half_precision(monkeypatch, kind, dtype):
    """Up to the rounding of the gradients to that precision."""
    comparison = DivergenceSpec(kind=kind, temperature=1.3)
    theirs = OutputLayer(weight=layer().weight.to(dtype), bias=layer().bias.to(dtype))
    ways = []
    for way in ("formula", "autograd"):
        with monkeypatch.context() as patch:
            only(way, patch)
            hidden, weights = normal(5, B, T, H).to(dtype), weights_of_tokens(torch.float32)
            ways.append(found(comparison, head(dtype=dtype), theirs, hidden=hidden, weights=weights))
    assert_same(ways[0][:2], ways[1][:2], 1e-5)
    for ours, other in zip(ways[0][2:], ways[1][2:], strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, other, atol=0.01 * float(other.abs().max()), rtol=0)


def test_gradients_can_be_taken_twice():
    comparison = DivergenceSpec(kind="reverse_kl", temperature=1.0)
    hidden, output = normal(5, B, T, H).requires_grad_(), head()
    batch = batch_of(weights_of_tokens(), hidden=normal(20, B, T, H_TEACHER), layers=(layer(),))
    value, _ = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    (2.0 * value).backward(retain_graph=True)
    once = output.weight.grad.clone()
    (2.0 * value).backward()
    torch.testing.assert_close(output.weight.grad, 2.0 * once)


def test_on_a_gpu_a_chunk_takes_a_quarter_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    for free, logits in ((0, 2**24), (6 * 2**30, 2**26), (70 * 2**30, 2**28)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * 2**30))
        tokens = logprob_head._tokens_at_a_time(2**17, torch.device("cuda"))
        assert tokens == logits // 2**17
