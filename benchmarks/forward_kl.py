"""Why forward KL on the student's own samples fails on the built-in task: plain PyTorch, without rlkd's trainer.

    python benchmarks/forward_kl.py

The teacher is the student shown a hint (the answer). Prints the greedy held-out accuracy every 20 iterations, for
forward and reverse KL on the student's own samples and for forward KL on the right completions; then the probability
that the teacher gives to the right letter, before and after a wrong one. Takes ten minutes on one core.
"""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from rlkd.builtin import resolve, task
from rlkd.builtin.make import chat_ids

ITERATIONS, PROMPTS, SAMPLES, HELDOUT, LR = 100, 16, 8, 128, 3e-4
PAD, EOS = 0, 1
LONGEST = 11
PATH = resolve("builtin:student")
TOKENIZER = AutoTokenizer.from_pretrained(PATH)


def load() -> LlamaForCausalLM:
    """The built-in student, in fp32."""
    return LlamaForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()


def completion_of(row: dict[str, str]) -> list[int]:
    """Token ids of the right completion, with the end token."""
    return [*TOKENIZER.encode(row["answer"]), EOS]


@torch.no_grad()
def generate(model: LlamaForCausalLM, prompts: list[list[int]], sample: bool) -> list[list[int]]:
    """One completion per prompt, up to the end token: sampled at temperature 1, or greedy."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=LONGEST, eos_token_id=EOS, pad_token_id=PAD, **how)
    rows = tokens[:, longest:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def log_probs(model: LlamaForCausalLM, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """Log-probs of all tokens at each place of each completion, [completion length, V] each."""
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    longest = max(map(len, texts))
    logits = model(torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])).logits
    return [
        row[len(p) - 1 : len(p) - 1 + len(c)].log_softmax(-1)
        for row, p, c in zip(logits, prompts, completions, strict=True)
    ]


def greedy_accuracy(model: LlamaForCausalLM, rows: list[dict[str, str]]) -> float:
    """Fraction of the rows whose greedy completion is exactly the right one."""
    written = generate(model, [chat_ids(TOKENIZER, row["prompt"]) for row in rows], sample=False)
    return sum(got == completion_of(row) for got, row in zip(written, rows, strict=True)) / len(rows)


def train(forward: bool, own_samples: bool) -> LlamaForCausalLM:
    """Train a student and print its accuracy every 20 iterations. Returns: the trained student."""
    torch.manual_seed(0)
    student, teacher = load(), load()
    rows = task.rows("train")
    random.Random(0).shuffle(rows)
    stream = itertools.cycle(rows)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0)
    for iteration in range(ITERATIONS + 1):
        if iteration % 20 == 0:
            print(
                f"  iteration {iteration}: greedy {greedy_accuracy(student, task.rows('heldout')[:HELDOUT]):.1%}",
                flush=True,
            )
        batch = [row for row in itertools.islice(stream, PROMPTS) for _ in range(SAMPLES)]
        plain = [chat_ids(TOKENIZER, row["prompt"]) for row in batch]
        hinted = [chat_ids(TOKENIZER, task.hinted_prompt(row)) for row in batch]
        completions = generate(student, plain, sample=True) if own_samples else [completion_of(row) for row in batch]
        with torch.no_grad():
            targets = log_probs(teacher, hinted, completions)
        losses = []
        for t, s in zip(targets, log_probs(student, plain, completions), strict=True):
            losses.append(((t.exp() * (t - s)) if forward else (s.exp() * (s - t))).sum(-1).mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return student


@torch.no_grad()
def sureness(student: LlamaForCausalLM) -> None:
    """Print the mean probability that the hinted teacher gives to the right letter on the student's samples."""
    teacher = load()
    found: dict[str, list[float]] = {"before a slip": [], "after a slip": []}
    for row in task.rows("heldout"):
        right = completion_of(row)
        (written,) = generate(student, [chat_ids(TOKENIZER, row["prompt"])], sample=True)
        (scores,) = log_probs(teacher, [chat_ids(TOKENIZER, task.hinted_prompt(row))], [written])
        for place in range(min(len(written), len(right))):
            when = "before a slip" if written[:place] == right[:place] else "after a slip"
            found[when].append(float(scores[place, right[place]].exp()))
    for when, values in found.items():
        mean = sum(values) / len(values)
        print(f"  {when}: the hinted teacher gives the right letter {mean:.1%} ({len(values)} letters)")


def main() -> None:
    """Train with each divergence in turn."""
    torch.set_num_threads(1)
    for name, forward, own in (
        ("forward KL, own samples", True, True),
        ("reverse KL, own samples", False, True),
        ("forward KL, right completions", True, False),
    ):
        print(name)
        student = train(forward, own)
        if name == "forward KL, own samples":
            sureness(student)


if __name__ == "__main__":
    main()
