"""The divergences by formula equal those through autograd, in value and gradient."""

import pytest
import torch
from divergence_reference import gradients, normal

from rlkd.losses import divergence, divergence_slopes
from rlkd.losses.divergence_slopes import values_and_slopes
from rlkd.losses.lm_head import project_into, projected, shape_in_place, shaped

V, N = 23, 4
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def assert_close(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def by_autograd(student, teacher, kind, beta, clip):
    """Logits [n, V] → values [n] and gradients [n, V] of the function that takes log-probs."""
    student = student.clone().requires_grad_()
    value = divergence(student.log_softmax(-1), teacher.log_softmax(-1), kind, beta, clip)
    return value.detach(), gradients(value.sum(), student)[0]


def by_formula(student, teacher, kind, beta, clip):
    found = values_and_slopes(student.T.contiguous(), teacher.T.contiguous(), kind, beta, clip)
    return found.values, (found.slopes * found.factor).T


@pytest.mark.parametrize("tile", [1, 3 * N, 5 * V * N], ids=["row by row", "three rows", "at once"])
@pytest.mark.parametrize("clip", [None, 1e-6, 0.02])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_formulas_are_those_of_autograd(monkeypatch, kind, beta, clip, tile):
    """Also far from 0, where the exponentials of the logits themselves would overflow."""
    monkeypatch.setattr(divergence_slopes, "TILE_LOGITS", tile)
    student, teacher = normal(1, N, V, scale=2.0), normal(2, N, V, scale=2.0)
    student[1] += 1e4
    teacher[2] -= 1e4
    got, wanted = (way(student, teacher, kind, beta, clip) for way in (by_formula, by_autograd))
    assert wanted[1].abs().max() > 1e-7
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_entropy_and_normaliser_of_the_student_are_by_products(monkeypatch, kind, beta, clip):
    monkeypatch.setattr(divergence_slopes, "TILE_LOGITS", 3 * N)
    student, teacher = normal(1, N, V, scale=2.0), normal(2, N, V, scale=2.0)
    student[1] += 1e4
    logits = student.T.contiguous(), teacher.T.contiguous()
    found = values_and_slopes(*(part.clone() for part in logits), kind, beta, clip, entropy=True)
    assert_close(found.log_z, student.logsumexp(-1))
    assert_close(found.entropy, torch.distributions.Categorical(logits=student).entropy())
    plain = values_and_slopes(*logits, kind, beta, clip)
    assert plain.entropy is None
    for part in ("values", "slopes", "factor", "log_z"):
        assert_close(getattr(found, part), getattr(plain, part))


@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_that_underflow_in_both_models_add_nothing(kind, beta, clip, dtype):
    student, teacher = normal(1, N, V, dtype=dtype), normal(2, N, V, dtype=dtype)
    student[:, 10:] -= 2e3
    teacher[:, 10:] -= 3e3
    whole = by_formula(student, teacher, kind, beta, clip)
    short = by_formula(student[:, :10], teacher[:, :10], kind, beta, clip)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert_close(whole[0], short[0], tolerance)
    assert_close(whole[1], torch.nn.functional.pad(short[1], (0, V - 10)), tolerance)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_single_precision_loses_nothing_in_a_wide_vocabulary(kind, beta):
    """Sums over 150,000 numbers of which none dominates. Autograd through PyTorch's log_softmax is off by 1e-5 in the
    value and by 1e-4 in the gradient there, because that sums them one after the other."""
    student, teacher = (normal(seed, 2, 150_000, dtype=torch.float32, scale=3.0) for seed in (1, 2))
    value, slopes = by_formula(student, teacher, kind, beta, None)
    exact, exact_slopes = by_formula(student.double(), teacher.double(), kind, beta, None)
    torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=0)
    error = (slopes.double() - exact_slopes).abs().amax(-1)
    tolerance = 2e-5 if kind == "jsd" else 3e-6  # log S − log M is small where the student dominates
    assert (error < tolerance * exact_slopes.abs().amax(-1)).all()


def test_a_beta_at_the_ends_is_refused():
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"got {beta}"):
            values_and_slopes(normal(1, V, N), normal(2, V, N), "jsd", beta)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_in_given_memory_are_the_projected_ones(monkeypatch, dtype, bias):
    monkeypatch.setattr("rlkd.losses.lm_head.WEIGHT_TILE", 21)  # three rows of the weight
    hidden, weight = normal(1, N, 7).to(dtype), normal(2, V, 7).to(dtype)
    offset = normal(3, V).to(dtype) if bias else None
    wanted = projected(hidden, weight, offset)
    for out in (torch.full((V, N), torch.nan, dtype=wanted.dtype), torch.full((V, N), torch.nan, dtype=torch.float64)):
        project_into(out, hidden, weight, offset)
        assert_close(out, wanted.T.to(out.dtype), 1e-6)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 0.5)])
def test_shaping_in_place_is_shaping(scale, softcap):
    raw = normal(1, V, N)
    shape_in_place(inside := raw.clone(), scale, softcap)
    assert_close(inside, shaped(raw, scale, softcap))
