"""Laws of the divergences, from log-probs and from hidden states, against a reference written in probabilities."""

import dataclasses
import itertools
import math

import pytest
import torch
from builders import with_scores
from divergence_reference import PLAIN, batch_of, gradients, normal, reference
from transformers import CohereConfig, Gemma2Config

from rlkd.algorithms.divergence_options import DivergenceConfig
from rlkd.losses import append_tail, divergence, renormalised, restrict_to
from rlkd.losses.divergence import summands
from rlkd.losses.lm_head import OutputLayer
from rlkd.models import logprob_head as policy_head
from rlkd.models.logprob_head import DivergenceSpec, teacher_divergence

B, T, V, H, H_TEACHER = 3, 6, 11, 7, 5
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]
SUPPORTS = [
    ("full", True),
    ("given", True),
    ("given", False),
    ("student_top_k", True),
    ("student_top_k", False),
]


def head(seed=0, vocabulary=V, bias=True, dtype=torch.float64):
    made = torch.nn.Linear(H, vocabulary, bias=bias, dtype=dtype)
    made.weight.data = normal(seed, vocabulary, H, dtype=dtype)
    if bias:
        made.bias.data = normal(seed + 1, vocabulary, dtype=dtype)
    return made


def layer(seed=10, vocabulary=V, width=H_TEACHER, **changes):
    return OutputLayer(weight=normal(seed, vocabulary, width), bias=normal(seed + 1, vocabulary), **changes)


def weights_of_tokens(dtype=torch.float64):
    """Weights of rows in which some tokens have a weight, but never column 0."""
    weights = torch.zeros(B, T, dtype=dtype)
    weights[0, 2:6], weights[1, 1:4], weights[2, 5] = 0.1, 0.25, -0.5
    return weights


def with_teacher(weights, theirs, comparison, hidden=None, width=V):
    """A batch with the teacher's hidden states, and its top k if the comparison uses them."""
    hidden = normal(20, *weights.shape, theirs.weight.shape[1]) if hidden is None else hidden
    batch = batch_of(weights, hidden=hidden, layers=(theirs,))
    if comparison.support != "given":
        return batch
    logits = theirs.logits(hidden.flatten(0, 1), width).view(*weights.shape, -1)
    top = (logits / comparison.temperature).log_softmax(-1).topk(comparison.k)
    return with_scores(batch, "teacher", hidden=None, layers=(), top_ids=top.indices, top_logprobs=top.values)


def naive(hidden, output, batch, theirs, teacher_hidden, comparison, width=V):
    """Σ weight · divergence without chunks. Column t is predicted from the student's hidden state t − 1."""
    logits_s = torch.roll(output(hidden), 1, dims=1)[..., :width]
    logits_t = (teacher_hidden @ theirs.weight.T + theirs.bias)[..., :width]
    values = reference(logits_s, logits_t, comparison)
    on = batch.loss_weights["kd"] != 0
    return (torch.where(on, values, 0.0) * batch.loss_weights["kd"]).sum(), torch.where(on, values, 0.0).detach()


def assert_close(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[1, 3], ids=["a token at a time", "three tokens at a time"])
def chunked(request, monkeypatch):
    """Eight tokens have a weight, so three at a time leave a shorter last chunk."""
    monkeypatch.setattr(policy_head, "CHUNK_LOGITS", request.param * V)


# ---- from log-probs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e-6, 0.05])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_clip_caps_each_entry_in_value_and_gradient(kind, beta, clip):
    student, teacher = normal(1, 4, V, scale=2.0).requires_grad_(), normal(2, 4, V, scale=2.0)
    got = divergence(student.log_softmax(-1), teacher.log_softmax(-1), kind, beta, clip)
    wanted = reference(student, teacher, DivergenceSpec(kind=kind, temperature=1.0, beta=beta, clip=clip))
    assert_close(got, wanted)
    assert_close(*(gradients(value.sum(), student)[0] for value in (got, wanted)))
    terms = summands(student.log_softmax(-1), teacher.log_softmax(-1), kind, beta)
    assert (terms > clip).any() and (got < terms.sum(-1)).any(), "otherwise the cap did nothing"


def test_a_clipped_kl_may_be_negative():
    student = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.9]], dtype=torch.float64).log()
    wanted = 0.05 - 0.1 * math.log(9.0)
    assert divergence(student, teacher, "forward_kl", clip=0.05).item() == pytest.approx(wanted)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_an_entry_that_neither_has_adds_nothing(kind, beta):
    """The padding of a top-k list is −inf on both sides: value and gradient are those of the shorter list."""
    student, teacher = normal(1, 4, V).requires_grad_(), normal(2, 4, V)
    absent = torch.zeros(4, V, dtype=torch.bool)
    absent[:, 5:] = True
    for closed in (append_tail, renormalised):
        whole = [x.log_softmax(-1) for x in (student, teacher)]
        padded = divergence(*(closed(x.masked_fill(absent, -torch.inf)) for x in whole), kind, beta)
        short = divergence(*(closed(x[:, :5]) for x in whole), kind, beta)
        assert_close(padded, short)
        assert_close(*(gradients(value.sum(), student)[0] for value in (padded, short)))


def test_top_k_with_its_tail_and_renormalised_are_distributions():
    top = normal(1, 4, V).log_softmax(-1)[:, :3]
    assert_close(append_tail(top).exp().sum(-1), torch.ones(4, dtype=torch.float64))
    assert_close(append_tail(top)[:, :3], top)
    assert_close(renormalised(top).exp().sum(-1), torch.ones(4, dtype=torch.float64))
    assert_close(renormalised(top).diff(dim=-1), top.diff(dim=-1))
    whole, ids = normal(1, 4, V).log_softmax(-1), torch.arange(3).expand(4, 3)
    assert_close(restrict_to(whole, ids, tail=True), append_tail(top))
    assert_close(restrict_to(whole, ids, tail=False), renormalised(top))
    assert_close(
        restrict_to(whole, torch.tensor([[0, -1, 1, V, 2]]).expand(4, 5), tail=True)[:, [0, 2, 4, 5]], append_tail(top)
    )


def test_the_tail_of_everything_is_finite_with_its_gradient():
    """In fp32 the sum of all probabilities may round to above 1, and then the tail has no logarithm."""
    logits = normal(3, 500, 40, dtype=torch.float32, scale=3.0).requires_grad_()
    everything = torch.arange(40).expand(500, 40)
    for tail in (append_tail(logits.log_softmax(-1)), restrict_to(logits.log_softmax(-1), everything, tail=True)):
        assert tail.isfinite().all()
        assert gradients(tail.sum(), logits)[0].isfinite().all()


def test_the_students_tail_is_exact_however_small():
    """The student is sure of its top k, the teacher doubts it: 1 − Σ p in fp32 would lose the gradient there."""
    student, ids = normal(3, 8, 500, dtype=torch.float32), torch.arange(20).expand(8, 20)
    student[:, 0] += 24.0  # the tail has a probability of about 1e-8
    log_t = torch.full((8, 21), math.log(0.9 / 20))
    log_t[:, 20] = math.log(0.1)

    def found(logits, kind):
        value = divergence(restrict_to(logits.log_softmax(-1), ids, tail=True), log_t.to(logits), kind)
        return value, gradients(value.sum(), logits)[0]

    for kind in ("forward_kl", "reverse_kl"):
        value, slope = found(student.requires_grad_(), kind)
        wanted, exact = found(student.detach().double().requires_grad_(), kind)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)
        torch.testing.assert_close(slope.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_teacher_gets_no_gradient(kind, beta):
    student, teacher = normal(1, 4, V).requires_grad_(), normal(2, 4, V).requires_grad_()
    value = divergence(student.log_softmax(-1), teacher.log_softmax(-1), kind, beta).sum()
    assert torch.autograd.grad(value, teacher, allow_unused=True)[0] is None


@pytest.mark.parametrize(("beta", "kind"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_the_rescaled_jsd_tends_to_the_kls(beta, kind):
    student, teacher = normal(1, 4, V).requires_grad_(), normal(2, 4, V)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    scale = DivergenceConfig(kind="jsd", beta=beta, rescale=True).scale
    got, wanted = scale * divergence(log_s, log_t, "jsd", beta), divergence(log_s, log_t, kind)
    assert_close(got, wanted, 1e-4)
    assert_close(*(gradients(value.sum(), student)[0] for value in (got, wanted)), 1e-4)
    assert DivergenceConfig(kind="jsd", beta=beta).scale == DivergenceConfig(kind=kind, rescale=True).scale == 1


# ---- from hidden states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(("support", "tail"), SUPPORTS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_chunked_is_naive(chunked, kind, beta, support, tail, clip):
    comparison = DivergenceSpec(kind=kind, temperature=1.3, beta=beta, clip=clip, support=support, k=4, tail=tail)
    hidden, output, theirs = normal(5, B, T, H).requires_grad_(), head(), layer()
    batch = with_teacher(weights_of_tokens(), theirs, comparison)
    value, per_token = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    wanted, wanted_per_token = naive(hidden, output, batch, theirs, normal(20, B, T, H_TEACHER), comparison)
    assert abs(wanted) > 1e-3 and not per_token.requires_grad
    assert_close(value, wanted)
    assert_close(per_token, wanted_per_token)
    inputs = (hidden, output.weight, output.bias)
    for got, want in zip(gradients(3.0 * value, *inputs), gradients(3.0 * wanted, *inputs), strict=True):
        assert want.abs().max() > 1e-4
        assert_close(got, want)


@pytest.mark.parametrize("support", ["full", "student_top_k"])
def test_a_tied_output_layer_gets_the_gradients_of_both_its_uses(chunked, support):
    comparison = DivergenceSpec(kind="reverse_kl", temperature=1.0, support=support, k=4)
    output, theirs, ids = head(bias=False), layer(), torch.arange(B * T).view(B, T) % V
    batch = with_teacher(weights_of_tokens(), theirs, comparison)
    got, _ = teacher_divergence(torch.tanh(output.weight[ids]), output, batch, comparison, PLAIN)
    wanted, _ = naive(torch.tanh(output.weight[ids]), output, batch, theirs, normal(20, B, T, H_TEACHER), comparison)
    assert_close(got, wanted)
    assert_close(*(gradients(value, output.weight)[0] for value in (got, wanted)))


@pytest.mark.parametrize(("support", "tail"), SUPPORTS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_teacher_equal_to_the_student_gives_nothing(kind, beta, support, tail):
    comparison = DivergenceSpec(kind=kind, temperature=0.7, beta=beta, support=support, k=4, tail=tail)
    hidden, output = normal(5, B, T, H).requires_grad_(), head()
    same = OutputLayer(weight=output.weight.detach().clone(), bias=output.bias.detach().clone())
    batch = with_teacher(weights_of_tokens(), same, comparison, torch.roll(hidden.detach(), 1, dims=1))
    value, per_token = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    assert value.abs() < 1e-12 and per_token.abs().max() < 1e-12
    for gradient in gradients(value, hidden, output.weight, output.bias):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(("support", "tail"), SUPPORTS[1:])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_top_k_of_the_whole_vocabulary_is_full(kind, beta, support, tail):
    full = DivergenceSpec(kind=kind, temperature=0.7, beta=beta)
    top = dataclasses.replace(full, support=support, k=V, tail=tail)
    hidden, output, theirs = normal(5, B, T, H).requires_grad_(), head(), layer()
    found = []
    for comparison in (full, top):
        value, _ = teacher_divergence(
            hidden, output, with_teacher(weights_of_tokens(), theirs, comparison), comparison, PLAIN
        )
        found.append((value, *gradients(value, hidden, output.weight, output.bias)))
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted)


def test_a_k_beyond_the_vocabulary_is_the_vocabulary():
    hidden, output, theirs = normal(5, B, T, H), head(), layer()
    values = []
    for k in (V, V + 5):
        comparison = DivergenceSpec(kind="jsd", temperature=1.0, support="student_top_k", k=k)
        batch = with_teacher(weights_of_tokens(), theirs, comparison)
        values.append(teacher_divergence(hidden, output, batch, comparison, PLAIN)[0])
    assert_close(*values)


@pytest.mark.parametrize(("support", "tail"), SUPPORTS)
def test_tokens_without_weight_do_not_matter_even_as_nan(support, tail):
    comparison = DivergenceSpec(kind="reverse_kl", temperature=1.0, support=support, k=4, tail=tail)
    hidden, output, theirs = normal(5, B, T, H), head(), layer()
    batch = with_teacher(weights_of_tokens(), theirs, comparison)
    off = batch.loss_weights["kd"] == 0
    name = "top_logprobs" if support == "given" else "hidden"
    spoilt = {name: getattr(batch.scores["teacher"], name).masked_fill(off[..., None], math.nan)}
    # the state that a token is predicted from is the one before it
    bad_hidden = hidden.masked_fill(torch.roll(off, -1, dims=1)[..., None], math.nan).requires_grad_()
    clean = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    value, per_token = teacher_divergence(
        bad_hidden, output, with_scores(batch, "teacher", **spoilt), comparison, PLAIN
    )
    assert value == clean[0] and torch.equal(per_token, clean[1])
    (gradient,) = gradients(value, bad_hidden)
    assert gradient.isfinite().all()
    assert (gradient[torch.roll(off, -1, dims=1)] == 0).all()


def test_a_batch_without_weights_keeps_the_graph_alive():
    comparison = DivergenceSpec(kind="jsd", temperature=1.0)
    hidden, output = normal(5, B, T, H).requires_grad_(), head()
    batch = with_teacher(torch.zeros(B, T, dtype=torch.float64), layer(), comparison)
    value, _ = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients(value, hidden, output.weight, output.bias))


def test_blend_goes_from_nothing_to_the_forward_kl():
    """TAID, arXiv 2501.16937: at 0 the target is the student itself, at 1 the teacher."""
    hidden, output, theirs = normal(5, B, T, H).requires_grad_(), head(), layer()
    plain = DivergenceSpec(kind="forward_kl", temperature=1.0)
    batch = with_teacher(weights_of_tokens(), theirs, plain)

    def found(blend):
        value, _ = teacher_divergence(hidden, output, batch, dataclasses.replace(plain, blend=blend), PLAIN)
        return value, gradients(value, hidden, output.weight)

    value, at_zero = found(0.0)
    assert value.abs() < 1e-12 and max(g.abs().max() for g in at_zero) < 1e-12
    for got, wanted in zip(found(1.0)[1], found(None)[1], strict=True):
        assert_close(got, wanted)
    comparison = dataclasses.replace(plain, blend=0.3)
    wanted, _ = naive(hidden, output, batch, theirs, normal(20, B, T, H_TEACHER), comparison)
    value, between = found(0.3)
    assert_close(value, wanted)
    assert_close(between[0], gradients(wanted, hidden)[0])


@pytest.mark.parametrize("support", ["full", "student_top_k", "given"])
@pytest.mark.parametrize(("ours", "theirs"), [(9, 12), (12, 9)])
def test_vocabularies_of_unequal_width_are_compared_on_the_common_columns(chunked, ours, theirs, support):
    """Embeddings are padded to 151,936 in one size of a model and to 152,064 in another; the tokenizer is the same.

    The teacher's top k are from its own full vocabulary; if padded rows have no probability, that is the same.
    """
    comparison = DivergenceSpec(kind="jsd", temperature=1.0, support=support, k=4)
    hidden, output, teacher = normal(5, B, T, H).requires_grad_(), head(vocabulary=ours), layer(vocabulary=theirs)
    output.bias.data[9:] = -1e4
    teacher.bias[9:] = -1e4
    batch = with_teacher(weights_of_tokens(), teacher, comparison, width=theirs)
    value, _ = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    wanted, _ = naive(hidden, output, batch, teacher, normal(20, B, T, H_TEACHER), comparison, width=9)
    assert_close(value, wanted)
    inputs = (hidden, output.weight, output.bias)
    for got, want in zip(gradients(value, *inputs), gradients(wanted, *inputs), strict=True):
        assert_close(got, want)


def test_a_teachers_token_outside_the_students_vocabulary_counts_to_the_tail():
    output, hidden = head(vocabulary=9), normal(5, 1, 2, H)
    weights = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    log_t = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64).log().expand(1, 2, 3)
    comparison = DivergenceSpec(kind="reverse_kl", temperature=1.0, support="given", k=3)
    batch = batch_of(weights, top_ids=torch.tensor([[[0, 0, 0], [3, 9, -1]]]), top_logprobs=log_t)
    value, _ = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    s = float(output(hidden[0, 0]).softmax(-1)[3])
    assert float(value) == pytest.approx(s * math.log(s / 0.5) + (1 - s) * math.log((1 - s) / 0.5))


@pytest.mark.parametrize("support", ["full", "student_top_k"])
def test_each_row_is_compared_with_its_own_teacher(chunked, support):
    """Two teachers of different hidden width in one batch, their states padded to the wider."""
    comparison = DivergenceSpec(kind="forward_kl", temperature=1.0, support=support, k=4)
    hidden, output = normal(5, B, T, H).requires_grad_(), head()
    layers = layer(10, width=5), layer(12, width=3)
    states = normal(20, B, T, 5), normal(21, B, T, 3)
    index = torch.tensor([0, 1, 0])
    both = states[0].clone()
    both[1] = torch.nn.functional.pad(states[1][1], (0, 2), value=99.0)
    weights = weights_of_tokens()
    batch = batch_of(weights, hidden=both, layers=layers, index=index)
    value, per_token = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    parts = [
        naive(hidden, output, batch_of(weights * (index == i)[:, None]), layers[i], states[i], comparison)
        for i in (0, 1)
    ]
    assert_close(value, parts[0][0] + parts[1][0])
    assert_close(per_token, parts[0][1] + parts[1][1])
    inputs = (hidden, output.weight, output.bias)
    for got, want in zip(gradients(value, *inputs), gradients(parts[0][0] + parts[1][0], *inputs), strict=True):
        assert_close(got, want)


def test_both_models_are_compared_at_the_temperature():
    """Dividing both models' logits by 2 by hand is temperature 2."""
    hidden, output, theirs = normal(5, B, T, H), head(), layer()
    cool = head()
    cool.weight.data, cool.bias.data = output.weight.data / 2, output.bias.data / 2
    halved = OutputLayer(weight=theirs.weight / 2, bias=theirs.bias / 2)
    for kind, beta in KINDS:
        hot = DivergenceSpec(kind=kind, beta=beta, temperature=2.0)
        one = dataclasses.replace(hot, temperature=1.0)
        a, _ = teacher_divergence(hidden, output, with_teacher(weights_of_tokens(), theirs, hot), hot, PLAIN)
        b, _ = teacher_divergence(hidden, cool, with_teacher(weights_of_tokens(), halved, one), one, PLAIN)
        assert_close(a, b)


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [(CohereConfig(logit_scale=0.25), 0.25, None), (Gemma2Config(final_logit_softcapping=2.0), 1.0, 2.0)],
    ids=["scale", "softcap"],
)
def test_logits_are_shaped_as_each_architecture_does(chunked, config, scale, softcap):
    """The student's logits by its config, the teacher's by its own layer, here with scale 3 and cap 5."""
    comparison = DivergenceSpec(kind="jsd", temperature=1.0)
    hidden, output, theirs = normal(5, B, T, H).requires_grad_(), head(), layer(scale=3.0, softcap=5.0)
    batch = with_teacher(weights_of_tokens(), theirs, comparison)
    value, _ = teacher_divergence(hidden, output, batch, comparison, config)
    logits = scale * torch.roll(output(hidden), 1, dims=1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    raw = normal(20, B, T, H_TEACHER) @ theirs.weight.T + theirs.bias
    wanted = (reference(logits, 5 * torch.tanh(3 * raw / 5), comparison) * batch.loss_weights["kd"]).sum()
    assert_close(value, wanted)
    inputs = (hidden, output.weight, output.bias)
    for got, want in zip(gradients(value, *inputs), gradients(wanted, *inputs), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(("support", "kind"), itertools.product(("full", "student_top_k"), ("forward_kl", "jsd")))
def test_half_precision_rounds_its_inputs_and_nothing_else(support, kind):
    """States and weights are bf16, logits are not rounded. The reference uses the same rounded numbers in float64."""
    comparison = DivergenceSpec(kind=kind, temperature=1.0, support=support, k=4)
    weights = weights_of_tokens(torch.float32)
    output, theirs = head(dtype=torch.bfloat16), layer()
    output.weight.data *= 3  # logits of about 20, whose spacing is 0.125 in bf16
    theirs = OutputLayer(weight=theirs.weight.bfloat16(), bias=theirs.bias.bfloat16())
    hidden = normal(5, B, T, H).bfloat16().requires_grad_()
    states = normal(20, B, T, H_TEACHER).bfloat16()
    batch = batch_of(weights, hidden=states, layers=(theirs,))
    value, _ = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    value.backward()
    exact = torch.nn.Linear(H, V, dtype=torch.float64)
    exact.weight.data, exact.bias.data = output.weight.data.double(), output.bias.data.double()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_theirs = OutputLayer(weight=theirs.weight.double(), bias=theirs.bias.double())
    wanted, _ = naive(exact_hidden, exact, batch, exact_theirs, states.double(), comparison)
    wanted.backward()
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for got, want in ((hidden, exact_hidden), (output.weight, exact.weight), (output.bias, exact.bias)):
        assert got.grad.dtype == torch.bfloat16
        torch.testing.assert_close(got.grad.double(), want.grad, atol=0.01 * float(want.grad.abs().max()), rtol=0)


def test_a_frozen_output_layer_gets_no_gradient():
    """As with LoRA. The gradient is as large as the layer, so it is not computed at all."""
    comparison = DivergenceSpec(kind="jsd", temperature=1.0)
    hidden, output, theirs = normal(5, B, T, H).requires_grad_(), head(), layer()
    batch = with_teacher(weights_of_tokens(), theirs, comparison)
    (wanted,) = gradients(teacher_divergence(hidden, output, batch, comparison, PLAIN)[0], hidden)
    output.requires_grad_(False)
    value, _ = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    assert_close(gradients(value, hidden)[0], wanted)
    value, _ = teacher_divergence(hidden, output, batch, comparison, PLAIN)
    value.backward()
    assert output.weight.grad is None and output.bias.grad is None
