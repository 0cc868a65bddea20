"""The output layer on a GPU: log-probs and divergences with their gradients, in bf16, against fp64."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config

from rlkd.losses import lm_head
from rlkd.losses.lm_head import OutputLayer
from rlkd.models import divergence_sum, logprob_head
from rlkd.models.logprob_head import DivergenceSpec, teacher_divergence, token_logprobs
from rlkd.models.student import load_causal_lm
from rlkd.types import Batch, BatchScores

pytestmark = pytest.mark.gpu

V, N = 151_936, 4096
ROWS, COLUMNS = slice(0, 64), slice(1000, 1032)
"""The tokens whose gradients, and the vocabulary entries whose weights' gradients, are compared."""
CONFIG = Qwen2Config(vocab_size=V)


def test_g6_the_kernel_gives_the_cpus_numbers(figure):
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    ids = torch.randint(4, 30, (4, 20), generator=torch.Generator().manual_seed(0))
    got = {}
    for device in ("cpu", "cuda"):
        torch.nn.Module.to(hf, device)
        hidden = hf.base_model(input_ids=ids.to(device)).last_hidden_state
        layer = hf.get_output_embeddings()
        got[device], _ = token_logprobs(hidden, layer, ids.to(device), temperature=0.7, config=hf.config)
    gap = float((got["cpu"] - got["cuda"].cpu()).abs().max())
    figure(f"largest |Δ log-prob| {gap:.1e} in fp32")
    assert gap < 1e-3


def made_up(width: int, device: str) -> tuple[Tensor, OutputLayer, Batch]:
    """(states [1, N + 1, H], the student's layer, a batch with a teacher's states): logits spread over 2.5 nats."""
    torch.manual_seed(width)
    hidden, states = torch.randn(2, 1, N + 1, width, device=device, dtype=torch.bfloat16).unbind()
    weights = torch.randn(2, V, width, device=device).mul_(2.5 / width**0.5).to(torch.bfloat16)
    student, teacher = (OutputLayer(weight=weight, bias=None) for weight in weights)
    zeros = torch.zeros(1, N + 1, device=device)
    completion = torch.arange(N + 1, device=device)[None] > 0
    batch = Batch(
        iteration=0,
        input_ids=torch.randint(0, V, (1, N + 1), device=device),
        lengths=torch.tensor([N + 1], device=device),
        prompt_lengths=torch.tensor([1], device=device),
        group=torch.tensor([0], device=device),
        completion_mask=completion,
        student_mask=completion,
        authors=torch.zeros(1, N + 1, dtype=torch.int64, device=device),
        sampler_logprobs=zeros,
        advantages=zeros,
        rewards=torch.zeros(1, device=device),
        weight_version=torch.tensor([0], device=device),
        scores={
            "teacher": BatchScores(
                logprobs=zeros, hidden=states, index=torch.tensor([0], device=device), layers=(teacher,)
            )
        },
        loss_weights={"kd": completion / N},
    )
    return hidden, student, batch


def run(act: Callable[[Tensor, OutputLayer], tuple[Tensor, Tensor]], hidden: Tensor, layer: OutputLayer):
    """(per-token values, gradients of hidden states and weight, ms, peak GiB above what was there) of a second run."""
    for _ in range(2):
        states, weight = hidden.clone().requires_grad_(), layer.weight.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        total, values = act(states, OutputLayer(weight=weight, bias=None))
        total.backward()
        torch.cuda.synchronize()
        ms = 1000 * (time.perf_counter() - began)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return values.detach()[0, 1:], states.grad[0, :-1], weight.grad, ms, peak


def exact(hidden: Tensor, layer: OutputLayer, batch: Batch, value: Callable[[Tensor, Tensor, Tensor], Tensor]):
    """The same in fp64, 256 tokens at a time: (values [N], gradient of ROWS' states, gradient of COLUMNS' weights).

    Args:
        value: (student's log-probs [n, V], teacher's, the actual tokens [n]) → [n].
    """
    weight = layer.weight.double()
    scores = batch.scores["teacher"]
    teacher = scores.layers[0].weight.double()
    values, columns, rows = [], torch.zeros(COLUMNS.stop - COLUMNS.start, hidden.shape[2]).to(weight), None
    for start in range(0, N, 256):
        part = slice(start, start + 256)
        states = hidden[0, part].double()
        logits = (states @ weight.T).requires_grad_()
        log_t = (scores.hidden[0, 1:][part].double() @ teacher.T).log_softmax(-1)
        found = value(logits.log_softmax(-1), log_t, batch.input_ids[0, 1:][part])
        (slopes,) = torch.autograd.grad(found.sum() / N, logits)
        values.append(found.detach())
        columns += slopes[:, COLUMNS].T @ states
        if start == 0:
            rows = slopes[ROWS] @ weight
    return torch.cat(values), rows, columns


def off(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("width", [896, 3584])
def test_g6_log_probs_and_their_gradients(width, figure):
    def act(states, layer):
        values, _ = token_logprobs(states, layer, batch.input_ids, temperature=1.0, config=CONFIG)
        return values.sum() / N, values

    hidden, layer, batch = made_up(width, "cuda")
    values, of_states, of_weight, ms, peak = run(act, hidden, layer)
    expected = exact(hidden, layer, batch, lambda log_s, _, ids: log_s.gather(1, ids[:, None])[:, 0])
    gap = float((values.double() - expected[0]).abs().mean())
    errors = off(of_states[ROWS], expected[1]), off(of_weight[COLUMNS], expected[2])
    figure(
        f"H = {width}: mean |Δ| {gap:.1e}, gradients off by {errors[0]:.1e} (states) and {errors[1]:.1e} (weight); "
        f"{ms:.0f} ms, {peak:.2f} GiB"
    )
    assert gap < 0.05 and max(errors) < 0.02


@pytest.mark.parametrize("width", [896, 3584])
def test_g6_divergences_and_their_gradients(width, figure, monkeypatch):
    """In chunks of 64 MiB and of 1 GiB, with products for the weight's gradient in bf16 and in fp32."""

    def act(states, layer):
        return teacher_divergence(states, layer, batch, spec, CONFIG)

    spec = DivergenceSpec(kind="reverse_kl", temperature=1.0)
    add_product, sizes = lm_head.add_product, {"64 MiB": 2**24, "1 GiB": 2**28}
    assert logprob_head.GPU_CHUNK_LOGITS == 2**28 and divergence_sum.add_product is add_product
    hidden, layer, batch = made_up(width, "cuda")
    expected = exact(hidden, layer, batch, lambda log_s, log_t, _: (log_s.exp() * (log_s - log_t)).sum(-1))
    found, worst = [], 0.0
    for products in ("bf16", "fp32"):
        in_fp32 = lambda total, left, right, half: add_product(total, left, right, None)  # noqa: E731
        monkeypatch.setattr(divergence_sum, "add_product", add_product if products == "bf16" else in_fp32)
        for size, logits in sizes.items():
            monkeypatch.setattr(logprob_head, "GPU_CHUNK_LOGITS", logits)
            values, of_states, of_weight, ms, peak = run(act, hidden, layer)
            errors = (
                float((values.double() - expected[0]).abs().mean() / expected[0].mean()),
                off(of_states[ROWS], expected[1]),
                off(of_weight[COLUMNS], expected[2]),
            )
            found.append(f"{size} {products} {ms:.0f} ms, {peak:.2f} GiB, off by {max(errors):.1e}")
            worst = max(worst, *errors)
    figure(f"H = {width}: " + "; ".join(found))
    assert worst < 0.02
