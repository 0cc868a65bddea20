"""Peak memory and time of a divergence computed from hidden states, chunked and naive, and their gradients' difference.

    python benchmarks/divergence_memory.py

Runs forward and backward, to hidden states and output layer, each variant in its own process, on the CPU in fp32.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from rlkd.losses.lm_head import OutputLayer
from rlkd.models import logprob_head as policy_head
from rlkd.models.logprob_head import DivergenceSpec, teacher_divergence
from rlkd.types import Batch, BatchScores

VOCABULARY, HIDDEN, TOKENS = 151_936, 256, 2_048
VARIANTS = ("chunked full", "naive full", "chunked student_top_k")


def inputs(vocabulary: int, tokens: int) -> tuple[Tensor, torch.nn.Linear, Batch]:
    """Student hidden states, output layer and batch: one row of `tokens` tokens, all but the first with a weight, and a
    teacher of the student's size."""
    torch.manual_seed(0)
    shape = (1, tokens)
    head = torch.nn.Linear(HIDDEN, vocabulary, bias=False)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, 0] = False
    batch = Batch(
        iteration=0,
        input_ids=torch.zeros(shape, dtype=torch.int64),
        lengths=torch.tensor([tokens]),
        prompt_lengths=torch.ones(1, dtype=torch.int64),
        group=torch.zeros(1, dtype=torch.int64),
        completion_mask=mask,
        student_mask=mask,
        authors=torch.zeros(shape, dtype=torch.int64),
        sampler_logprobs=torch.zeros(shape),
        advantages=torch.zeros(shape),
        rewards=torch.zeros(1),
        weight_version=torch.zeros(1, dtype=torch.int64),
        scores={
            "teacher": BatchScores(
                logprobs=torch.zeros(shape),
                index=torch.zeros(1, dtype=torch.int64),
                hidden=3 * torch.randn(*shape, HIDDEN),
                layers=(OutputLayer(weight=torch.randn(vocabulary, HIDDEN) / HIDDEN**0.5, bias=None),),
            )
        },
        loss_weights={"kd": mask / mask.sum()},
    )
    return (3 * torch.randn(*shape, HIDDEN)).requires_grad_(), head, batch


def run(variant: str, hidden: Tensor, head: torch.nn.Linear, batch: Batch) -> None:
    """Compute the mean reverse KL and leave its gradients in `hidden` and `head`."""
    how, support = variant.split()
    if how == "chunked":
        comparison = DivergenceSpec(kind="reverse_kl", temperature=1.0, support=support, k=100)  # type: ignore[arg-type]
        teacher_divergence(hidden, head, batch, comparison, LlamaConfig())[0].backward()
        return
    assert batch.scores["teacher"].hidden is not None
    log_s = head(hidden[:, :-1]).log_softmax(-1)
    log_t = (batch.scores["teacher"].hidden[:, 1:] @ batch.scores["teacher"].layers[0].weight.T).log_softmax(-1)
    ((log_s.exp() * (log_s - log_t)).sum(-1) * batch.loss_weights["kd"][:, 1:]).sum().backward()


def measured(variant: str) -> dict[str, Any]:
    """Run `variant` in this process. Returns: seconds, peak GiB, and GiB above the peak of the inputs."""
    hidden, head, batch = inputs(VOCABULARY, TOKENS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    run(variant, hidden, head, batch)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak / 2**20, "extra": (peak - before) / 2**20}


def main() -> None:
    """Print a line per variant, then the difference of the gradients."""
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1])))
        return
    print(f"vocabulary {VOCABULARY:,}, hidden {HIDDEN}, {TOKENS:,} tokens, {torch.get_num_threads()} threads")
    for variant in VARIANTS:
        done = subprocess.run([sys.executable, __file__, variant], capture_output=True, text=True)
        if done.returncode:
            print(f"{variant:<22} ended with {done.returncode} (−9: out of memory)")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{variant:<22} {row['seconds']:6.1f} s  peak {row['peak']:5.2f} GiB, {row['extra']:5.2f} above the inputs"
        )
    policy_head.CHUNK_LOGITS = 20 * 5_000  # 20 tokens at a time; by default all would fit into one chunk
    found = []
    for variant in VARIANTS[:2]:
        hidden, head, batch = inputs(5_000, 256)
        run(variant, hidden, head, batch)
        assert hidden.grad is not None and head.weight.grad is not None
        found.append((hidden.grad, head.weight.grad))
    for name, a, b in zip(("hidden", "weight"), *found, strict=True):
        print(f"gradient of {name}: max difference {(a - b).abs().max():.1e}, largest entry {b.abs().max():.1e}")


if __name__ == "__main__":
    main()
