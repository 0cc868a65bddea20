"""Time and memory of a full-vocabulary divergence from hidden states, beside TRL's kernel and the products alone.

    OMP_NUM_THREADS=2 python benchmarks/divergence_memory.py [--rounds 7] [--tokens 1024] [--kind reverse_kl]

Forward and backward, to hidden states and output layer, on the CPU in fp32. First the values and gradients of both are
compared. Then each is timed in turn, in one process, and the ratio is the median over the turns. The products are the
four that any gradient needs: both models' logits, and the gradients of hidden states and output layer. Last, each runs
in a fresh process, whose peak resident memory above that of the inputs is printed. It includes the gradients, which are
as large as the output layer and the hidden states.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from rlkd.losses.lm_head import OutputLayer
from rlkd.models.logprob_head import DivergenceSpec, _tokens_at_a_time, teacher_divergence
from rlkd.types import Batch, BatchScores

VOCABULARY, HIDDEN = 151_936, 256
TRL_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
VARIANTS = ("rlkd", "trl", "naive", "rlkd student_top_k")


def inputs(vocabulary: int, tokens: int) -> tuple[Tensor, torch.nn.Linear, Batch]:
    """Student hidden states, output layer and batch: one row in which `tokens` tokens, all but the first, have a
    weight, and a teacher of the student's size."""
    torch.manual_seed(0)
    shape = (1, tokens + 1)
    head = torch.nn.Linear(HIDDEN, vocabulary, bias=False)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, 0] = False
    batch = Batch(
        iteration=0,
        input_ids=torch.zeros(shape, dtype=torch.int64),
        lengths=torch.tensor([shape[1]]),
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


def run(variant: str, kind: str, hidden: Tensor, head: torch.nn.Linear, batch: Batch) -> Tensor:
    """Compute the mean divergence and leave its gradients in `hidden` and `head`."""
    scores, weights = batch.scores["teacher"], batch.loss_weights["kd"][:, 1:]
    assert scores.hidden is not None
    if variant.startswith("rlkd"):
        support = variant.removeprefix("rlkd").strip() or "full"
        comparison = DivergenceSpec(kind=kind, temperature=1.0, support=support, k=100)  # type: ignore[arg-type]
        value = teacher_divergence(hidden, head, batch, comparison, LlamaConfig())[0]
    elif variant == "trl":
        states, theirs = scores.hidden[:, 1:].flatten(0, 1), scores.layers[0].weight
        per_token, _ = ChunkedDivergenceFunction.apply(
            hidden[:, :-1].flatten(0, 1), head.weight, None, states, theirs, None, TRL_BETA[kind]
        )
        value = (per_token * weights.flatten()).sum()
    else:
        assert kind == "reverse_kl", "the naive variant is only for reverse_kl"
        log_s = head(hidden[:, :-1]).log_softmax(-1)
        log_t = (scores.hidden[:, 1:] @ scores.layers[0].weight.T).log_softmax(-1)
        value = ((log_s.exp() * (log_s - log_t)).sum(-1) * weights).sum()
    value.backward()
    return value.detach()


def products(hidden: Tensor, head: torch.nn.Linear, batch: Batch) -> None:
    """The four matrix products, in chunks of the size that rlkd uses, without anything between them."""
    scores, weight = batch.scores["teacher"], head.weight.detach()
    assert scores.hidden is not None
    ours, theirs = hidden.detach()[0, :-1], scores.hidden[0, 1:]
    of_weight, of_hidden = torch.zeros_like(weight), torch.empty_like(ours)
    step = _tokens_at_a_time(len(weight), weight.device)
    logits = [torch.empty(len(weight) * min(step, len(ours))) for _ in range(2)]
    for start in range(0, len(ours), step):
        h, t = ours[start : start + step], theirs[start : start + step]
        s, other = (memory[: len(weight) * len(h)].view(len(weight), len(h)) for memory in logits)
        torch.mm(weight, h.T, out=s)
        torch.mm(scores.layers[0].weight, t.T, out=other)
        torch.mm(s.T, weight, out=of_hidden[start : start + step])
        of_weight.addmm_(s, h)


def compare(kind: str, tokens: int) -> None:
    """Print how far the values and gradients of rlkd and TRL are apart, and stop if that is more than rounding."""
    hidden, head, batch = inputs(VOCABULARY, tokens)
    found = []
    for variant in ("rlkd", "trl"):
        hidden.grad = head.weight.grad = None
        value = run(variant, kind, hidden, head, batch)
        assert hidden.grad is not None and head.weight.grad is not None
        found.append((value, hidden.grad, head.weight.grad))
    for name, ours, theirs in zip(("value", "gradient of hidden", "gradient of weight"), *found, strict=True):
        difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
        print(
            f"{name:<19} largest difference {difference:.1e}, largest entry {largest:.1e}: {difference / largest:.1e}"
        )
        assert difference < 1e-3 * largest, "the two do not compute the same"


def timed(kind: str, tokens: int, rounds: int) -> None:
    """Print the seconds of rlkd, TRL and the products alone, taken in turn: on the clock, and of CPU time, which other
    processes on the machine disturb less."""
    hidden, head, batch = inputs(VOCABULARY, tokens)
    work: dict[str, Callable[[], object]] = {
        "rlkd": lambda: run("rlkd", kind, hidden, head, batch),
        "trl": lambda: run("trl", kind, hidden, head, batch),
        "products alone": lambda: products(hidden, head, batch),
    }
    clocks = {"clock": time.perf_counter, "CPU": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in work} for clock in clocks}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, compute in work.items():
            hidden.grad = head.weight.grad = None
            gc.collect()
            started = {clock: now() for clock, now in clocks.items()}
            compute()
            for clock, now in clocks.items():
                if turn:
                    seconds[clock][name].append(now() - started[clock])
        if turn:
            print(f"turn {turn}: " + ", ".join(f"{name} {each[-1]:.2f} s" for name, each in seconds["clock"].items()))
    for clock, of_work in seconds.items():
        for name, found in of_work.items():
            every = " ".join(f"{each:.2f}" for each in found)
            print(
                f"{clock:<5} {name:<14} median {statistics.median(found):6.2f} s, fastest {min(found):6.2f} ({every})"
            )
        for other in ("trl", "products alone"):
            ratios = [ours / theirs for ours, theirs in zip(of_work["rlkd"], of_work[other], strict=True)]
            fastest = min(of_work["rlkd"]) / min(of_work[other])
            print(
                f"{clock:<5} rlkd / {other}: {statistics.median(ratios):.2f} in the median turn, {fastest:.2f} fastest"
            )


def resident(entry: str) -> float:
    """GiB of this process: `VmRSS`, or its peak `VmHWM`. The peak of getrusage is inherited from the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 2**20


def measured(variant: str, kind: str, tokens: int) -> dict[str, float]:
    """Run `variant` in this process. Returns: peak GiB, and GiB above the inputs."""
    run(variant, kind, *inputs(500, 8))  # so that code loaded at the first use is not counted
    hidden, head, batch = inputs(VOCABULARY, tokens)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident("VmRSS")
    run(variant, kind, hidden, head, batch)
    peak = resident("VmHWM")
    return {"peak": peak, "extra": peak - before}


def memories(kind: str, tokens: int) -> None:
    """Print the peak memory of every variant, each in a process of its own."""
    extra = {}
    for variant in VARIANTS:
        if variant == "naive" and kind != "reverse_kl":
            continue
        command = [sys.executable, __file__, "--only", variant, "--kind", kind, "--tokens", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{variant:<19} ended with {done.returncode} (−9: out of memory)")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        extra[variant] = row["extra"]
        print(f"{variant:<19} {row['extra']:5.2f} GiB above the inputs, peak {row['peak']:5.2f} GiB")
    gradients = 4 * HIDDEN * (VOCABULARY + tokens) / 2**30
    print(f"rlkd / trl          {extra['rlkd'] / extra['trl']:.2f}; the gradients alone are {gradients:.2f} GiB")


def main() -> None:
    """Print the agreement, the times and the memories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(TRL_BETA), default="reverse_kl")
    parser.add_argument("--tokens", type=int, default=1_024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=VARIANTS, help="measure the memory of one variant in this process")
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(measured(asked.only, asked.kind, asked.tokens)))
        return
    print(
        f"{asked.kind}, vocabulary {VOCABULARY:,}, hidden {HIDDEN}, {asked.tokens:,} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    compare(asked.kind, asked.tokens)
    timed(asked.kind, asked.tokens, asked.rounds)
    memories(asked.kind, asked.tokens)


if __name__ == "__main__":
    main()
