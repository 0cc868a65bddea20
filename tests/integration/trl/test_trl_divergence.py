"""The same numbers as TRL 1.16 on the same random tensors. Where we differ on purpose, the test says why."""

import pytest
import torch
from divergence_reference import PLAIN, batch_of, gradients, normal, reference
from transformers import CohereConfig, Gemma2Config

from rlkd.losses import append_tail, divergence, generalized_jsd, restrict_to
from rlkd.losses.lm_head import OutputLayer
from rlkd.models import logprob_head as policy_head
from rlkd.models.logprob_head import DivergenceSpec, teacher_divergence

pytestmark = pytest.mark.long

B, T, V, H, K = 2, 9, 40, 16, 6
SAME_AS = [(0.0, "forward_kl"), (0.1, "jsd"), (0.5, "jsd"), (0.9, "jsd"), (1.0, "reverse_kl")]
"""TRL's β → our kind. TRL jumps from β·KL(T‖M) + (1−β)·KL(S‖M) to the plain KLs at the end points, where that formula
is 0: its loss at β = 0.001 is a thousandth of the one at 0. We have separate kinds for the KLs and refuse β = 0."""


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def pair():
    student = normal(1, B, T, V, dtype=torch.float32, scale=2.0).requires_grad_()
    return student, normal(2, B, T, V, dtype=torch.float32, scale=2.0)


def log_softmaxes(student, teacher, temperature=1.0):
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def assert_same(ours, trl, student):
    """Compare the value per token, and the gradient of an uneven sum."""
    close(ours, trl)
    uneven = torch.linspace(0.5, 2.0, ours.numel()).view(ours.shape)
    slopes = [gradients((value * uneven).sum(), student)[0] for value in (ours, trl)]
    assert slopes[1].abs().max() > 1e-3
    close(*slopes)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("beta", "kind"), SAME_AS)
def test_gkd(beta, kind, temperature):
    """Neither TRL nor we multiply by temperature²."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = pair()
    trl = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="none")
    ours = divergence(*log_softmaxes(student, teacher, temperature), kind, beta)
    assert_same(ours, trl.sum(-1), student)
    if kind == "jsd":
        close(generalized_jsd(student / temperature, teacher / temperature, beta), ours)


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (PLAIN, 1.0, None),
        (CohereConfig(logit_scale=0.25), 0.25, None),
        (Gemma2Config(final_logit_softcapping=5.0), 1.0, 5.0),
    ],
    ids=["plain", "scale", "softcap"],
)
@pytest.mark.parametrize(("beta", "kind"), SAME_AS)
def test_chunked_from_hidden_states(monkeypatch, beta, kind, config, scale, softcap):
    """TRL's kernel splits the vocabulary and recomputes the logits in the backward pass; we split the tokens instead.

    It gives per-token values with gradient, we a weighted sum. It has no clip, no top k, no blend, one teacher, and
    needs vocabularies of equal width.
    """
    from trl.kernels import chunked_divergence

    monkeypatch.setattr(policy_head, "CHUNK_LOGITS", 5 * V)
    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", 16)
    head = torch.nn.Linear(H, V)
    head.weight.data, head.bias.data = (
        normal(i, *p.shape, dtype=torch.float32) for i, p in enumerate(head.parameters())
    )
    hidden = normal(3, B, T, H, dtype=torch.float32, scale=0.3).requires_grad_()
    theirs = OutputLayer(
        weight=normal(4, V, 2 * H, dtype=torch.float32), bias=normal(5, V, dtype=torch.float32), scale=0.5, softcap=9.0
    )
    states = normal(6, B, T, 2 * H, dtype=torch.float32, scale=0.3)
    weights = torch.linspace(0.1, 1.0, T).expand(B, T).clone()
    weights[:, 0] = 0
    comparison = DivergenceSpec(kind=kind, temperature=0.7, beta=beta)
    batch = batch_of(weights, hidden=states, layers=(theirs,))
    ours, per_token = teacher_divergence(hidden, head, batch, comparison, config)
    trl, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
        hidden[:, :-1].flatten(0, 1), head.weight, head.bias, states[:, 1:].flatten(0, 1), theirs.weight, theirs.bias,
        beta, 0.7, scale, softcap, theirs.scale, theirs.softcap,
    )  # fmt: skip
    close(per_token[:, 1:].flatten(), trl.detach())
    total = (trl * weights[:, 1:].flatten()).sum()
    close(ours, total)
    inputs = (hidden, head.weight, head.bias)
    for got, wanted in zip(gradients(ours, *inputs), gradients(total, *inputs), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("beta", "kind"), SAME_AS)
def test_sdpo_on_the_students_top_k(beta, kind, tail):
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    student, teacher = pair()
    trl = compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=K, distillation_alpha=beta, distillation_add_tail=tail
    )
    ids = student.topk(K, dim=-1).indices
    ours = divergence(*(restrict_to(x, ids, tail) for x in log_softmaxes(student, teacher)), kind, beta)
    assert_same(ours, trl, student)


@pytest.mark.parametrize(("beta", "kind"), SAME_AS)
def test_a_served_teachers_top_k_with_the_tail_bucket(beta, kind):
    """From the k log-probs that a server returns, the last of which is missing in some rows."""
    from trl.experimental.server_distillation import server_distillation_trainer as trl

    student, teacher = pair()
    log_s, log_t = log_softmaxes(student, teacher)
    top = log_t.topk(K)
    valid = torch.ones(B, T, K, dtype=torch.bool)
    valid[0, :, 4:] = False
    said = top.values.masked_fill(~valid, -torch.inf)
    of_student, mask = trl._add_tail_bucket(log_s.gather(-1, top.indices).masked_fill(~valid, -torch.inf), valid)
    of_teacher, _ = trl._add_tail_bucket(said, valid)
    wanted = trl._jsd_divergence(of_student, of_teacher, beta, mask).sum(-1)
    ids = top.indices.masked_fill(~valid, -1)
    ours = divergence(restrict_to(log_s, ids, tail=True), append_tail(said), kind, beta)
    assert_same(ours, wanted, student)


def test_where_the_student_is_sure_of_its_top_k_trl_loses_the_tail():
    """1 − Σ p in fp32 has no precision below 1e-7 and is clamped there, with zero gradient. We sum the other tokens."""
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    student, teacher = pair()
    with torch.no_grad():
        student[..., :K] += 24.0

    comparison = DivergenceSpec(kind="forward_kl", temperature=1.0, support="student_top_k", k=K)
    ids = student.topk(K, dim=-1).indices
    ours = divergence(*(restrict_to(x, ids, True) for x in log_softmaxes(student, teacher)), "forward_kl")
    trl = compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=K, distillation_alpha=0.0, distillation_add_tail=True
    )
    double = student.detach().double().requires_grad_()
    exact = reference(double, teacher.double(), comparison)
    (slope,) = gradients(exact.sum(), double)
    torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients(ours.sum(), student)[0].double(), slope, atol=1e-4, rtol=0)
    assert (trl.double() - exact).abs().max() > 0.1
    assert (gradients(trl.sum(), student)[0].double() - slope).abs().max() > 0.05
