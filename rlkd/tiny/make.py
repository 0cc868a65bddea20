"""Train the two tiny models: `python -m rlkd.tiny.make --out DIR`, or measure made ones with `--check DIR`.

Both learn by plain supervised training on random words that are not held out. The teacher sees enough of them to
solve the task. The student learns to copy a hint, and then gets just so many examples without one that it sometimes
finds the answer by itself: a start from which rewards are rare, and from which there is a long way to go.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rlkd.tiny import task, tokenizer

HEAD_DIM = 32  # the smallest that vLLM serves on a CPU
BATCH = 64
TEACHER_STEPS = 800
HINT_STEPS = 200
STUDENT_STEPS_AT_MOST = 1000
STUDENT_STOP = 0.10

BOUNDS = {
    ("teacher", False): (0.95, 1.0),
    ("teacher", True): (0.95, 1.0),
    ("student", False): (0.05, 0.20),
    ("student", True): (0.90, 1.0),
}
"""(model, whether it is shown the answer) → lowest and highest greedy accuracy on the held-out words."""


def fresh_model(name: str, tok: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained "student" (0.1 M parameters, tied embeddings) or "teacher" (0.7 M, untied)."""
    hidden, layers, width = {"student": (64, 2, 176), "teacher": (128, 4, 256)}[name]
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=width,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        tie_word_embeddings=name == "student",
        initializer_range=0.05,
        pad_token_id=tok.pad_token_id,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
    )
    return LlamaForCausalLM(config)


def chat_ids(tok: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a one-turn chat that waits for the answer."""
    text = tok.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    return tok.encode(text)


def padded(sequences: Sequence[list[int]], pad: int) -> torch.Tensor:
    """[B, T] int64, padded on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([s + [pad] * (longest - len(s)) for s in sequences])


def supervised_loss(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerBase, examples: Iterable[tuple[str, str]]
) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, end of sequence included; examples are (prompt, answer)."""
    inputs, labels = [], []
    for prompt, answer in examples:
        asked, answered = chat_ids(tok, prompt), [*tok.encode(answer), tok.eos_token_id]
        inputs.append(asked + answered)
        labels.append([-100] * len(asked) + answered)
    logits = model(input_ids=padded(inputs, tok.pad_token_id)).logits  # right padding: the causal mask hides it
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), padded(labels, -100)[:, 1:].flatten())


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tok: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The most likely completion of each prompt, as text."""
    sequences = [chat_ids(tok, prompt) for prompt in prompts]
    starts = [len(s) for s in sequences]
    for _ in range(task.ANSWER_TOKENS):
        logits = model(input_ids=padded(sequences, tok.pad_token_id)).logits
        for row, sequence in enumerate(sequences):
            sequence.append(int(logits[row, len(sequence) - 1].argmax()))
    completions = [s[start:] for s, start in zip(sequences, starts, strict=True)]
    ended = [list(itertools.takewhile(lambda token: token != tok.eos_token_id, c)) for c in completions]
    return tok.batch_decode(ended, skip_special_tokens=False)


def accuracy(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerBase, examples: Sequence[dict[str, str]], *, hinted: bool
) -> float:
    """Share of `examples` that the model answers exactly, greedily, with the answer in the prompt or without."""
    prompts = [task.hinted_prompt(e) if hinted else e["prompt"] for e in examples]
    answers = greedy(model, tok, prompts)
    return sum(a == e["answer"] for a, e in zip(answers, examples, strict=True)) / len(examples)


def teacher_rate(step: int) -> float:
    """Learning rate of the teacher: a short warm-up, then a cosine down to a twentieth."""
    return 2e-3 * min(1.0, (step + 1) / 50) * max(0.05, 0.5 * (1 + math.cos(math.pi * step / TEACHER_STEPS)))


def student_rate(step: int) -> float:
    """Learning rate of the student: a short warm-up, then constant, for its training ends where it ends."""
    return 2e-3 * min(1.0, (step + 1) / 50)


def training(
    model: LlamaForCausalLM,
    tok: PreTrainedTokenizerBase,
    *,
    rate: Callable[[int], float],
    hinted_share: Callable[[int], float],
    seed: int,
) -> Iterator[int]:
    """Supervised training without end; yields the number of finished steps after each.

    `rate` and `hinted_share` (of the rows of a batch that show the answer) are functions of the step.
    """
    draw, source = random.Random(seed), task.words("train", seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate(0), weight_decay=0.01)
    for step in itertools.count():
        examples = []
        for _ in range(BATCH):
            example = task.row(next(source), "")
            hinted = draw.random() < hinted_share(step)
            examples.append((task.hinted_prompt(example) if hinted else example["prompt"], example["answer"]))
        loss = supervised_loss(model, tok, examples)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        yield step + 1


def make_teacher(tok: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A model that solves the task."""
    torch.manual_seed(seed)
    model = fresh_model("teacher", tok)
    for done in training(model, tok, rate=teacher_rate, hinted_share=lambda step: 0.3, seed=seed + 1):
        if done == TEACHER_STEPS:
            break
    return model


def make_student(tok: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A model that copies a hint, and without one is right on about one word in eight.

    Without hints it goes from nothing to everything within some hundred steps, so training stops where its accuracy
    on training words first reaches STUDENT_STOP, not after a fixed number of steps.

    Raises: RuntimeError if that does not happen.
    """
    torch.manual_seed(seed)
    model = fresh_model("student", tok)
    sample = task.rows("train")[:256]

    def hinted_share(step: int) -> float:
        return 1.0 if step < HINT_STEPS else 0.75

    for done in training(model, tok, rate=student_rate, hinted_share=hinted_share, seed=seed + 2):
        if done > HINT_STEPS and done % 5 == 0 and accuracy(model, tok, sample, hinted=False) >= STUDENT_STOP:
            return model
        if done == STUDENT_STEPS_AT_MOST:
            break
    raise RuntimeError(f"after {STUDENT_STEPS_AT_MOST} steps the student's accuracy is still below {STUDENT_STOP}")


def check(folder: Path) -> bool:
    """Measure the two models in `folder` on the held-out words, print the figures, say whether all are in bounds."""
    held_out = task.rows("heldout")
    passed = True
    for (name, hinted), (low, high) in BOUNDS.items():
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        tok = AutoTokenizer.from_pretrained(folder / name)
        got = accuracy(model, tok, held_out, hinted=hinted)
        good = low <= got <= high
        form = "hinted" if hinted else "plain"
        print(f"{name} {form}: {got:.3f} (wanted {low} to {high}){'' if good else '  OUT OF BOUNDS'}")
        passed = passed and good
    return passed


def main() -> int:
    """Make or check; the exit code is 1 when a model misses its bounds."""
    parser = argparse.ArgumentParser(prog="python -m rlkd.tiny.make", description="Make or check the tiny models.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="train both into DIR, then check")
    action.add_argument("--check", type=Path, metavar="DIR", help="only measure the models of this folder")
    parser.add_argument("--seed", type=int, default=0, help="of weights and words (default 0, as packaged)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in a fixed order: the same seed gives the same weights
    if arguments.check is not None:
        return 0 if check(arguments.check) else 1
    tok = tokenizer.build()
    for name, make in (("student", make_student), ("teacher", make_teacher)):
        print(f"training the {name}", flush=True)
        make(tok, arguments.seed).save_pretrained(arguments.out / name)
        tok.save_pretrained(arguments.out / name)
    return 0 if check(arguments.out) else 1


if __name__ == "__main__":
    sys.exit(main())
