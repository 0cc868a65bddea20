"""The divergences in probabilities, and batches to compare with; nothing is shared with the code under test."""

import torch
from transformers import LlamaConfig

from rlkd.types import Batch, BatchScores

PLAIN = LlamaConfig()


def normal(seed, *shape, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch_of(weights, **changes):
    """Of a teacher with these `BatchScores`."""
    rows, columns = weights.shape
    on = weights != 0
    filled = {
        "iteration": 0,
        "input_ids": torch.zeros(rows, columns, dtype=torch.int64),
        "lengths": torch.full((rows,), columns),
        "prompt_lengths": torch.ones(rows, dtype=torch.int64),
        "group": torch.arange(rows),
        "completion_mask": on,
        "student_mask": on,
        "authors": torch.zeros(rows, columns, dtype=torch.int64),
        "sampler_logprobs": torch.zeros(rows, columns),
        "advantages": torch.zeros(rows, columns),
        "rewards": torch.zeros(rows),
        "weight_version": torch.zeros(rows, dtype=torch.int64),
        "masks": {"kd": on},
        "loss_weights": {"kd": weights},
    }
    scores = BatchScores(
        logprobs=torch.zeros(rows, columns), **({"index": torch.zeros(rows, dtype=torch.int64)} | changes)
    )
    return Batch(**filled, scores={"teacher": scores})


def reference(logits_s, logits_t, comparison):
    """[..., V] logits of both → [...], by the definitions in probabilities; nothing shared with the code under test."""
    if comparison.blend is not None:
        logits_t = (1 - comparison.blend) * logits_s.detach() + comparison.blend * logits_t
    s, t = (torch.softmax(z / comparison.temperature, -1) for z in (logits_s, logits_t.detach()))
    if comparison.support != "full":
        ids = (t if comparison.support == "given" else s.detach()).topk(comparison.k).indices
        s, t = s.gather(-1, ids), t.gather(-1, ids)
        if comparison.tail:
            s, t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (s, t))
        else:
            s, t = (p / p.sum(-1, keepdim=True) for p in (s, t))
    if comparison.kind == "forward_kl":
        terms = t * torch.log(t / s)
    elif comparison.kind == "reverse_kl":
        terms = s * torch.log(s / t)
    else:
        beta = comparison.beta
        mixed = beta * t + (1 - beta) * s
        terms = beta * t * torch.log(t / mixed) + (1 - beta) * s * torch.log(s / mixed)
    if comparison.clip is not None:
        terms = torch.minimum(terms, torch.tensor(comparison.clip, dtype=terms.dtype))
    return terms.sum(-1)


def gradients(value, *inputs):
    return torch.autograd.grad(value, inputs, retain_graph=True)
