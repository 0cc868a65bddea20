"""Train the tiny models: `python -m rlkd.builtin.make --out DIR`, or measure made ones with `--check DIR`.

All learn by plain supervised training on random words that are not held out. The teacher always picks the right
letter, but smoothed labels keep it unsure: sampled at temperature 1 it often slips, so that imitating it is not the
best that a student can do. The student first learns the task, then to slip wherever the prompt has no hint: sampled,
it is right once in some ten thousand words. Rewards alone are too rare to learn from; a teacher corrects every letter.
The mentor has two faces, as a model that is prompted in two ways: asked for a word it answers with a slip now and then;
shown a word and an answer it writes a word of reflection, and gives the right one. It is its own student's teacher.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rlkd.builtin import task, tokenizer

HEAD_DIM = 32  # the smallest that vLLM serves on a CPU
BATCH = 64
STUDENT_STEPS = 800, 400  # taught rightly, then with slips
TEACHER_STEPS = 600
MENTOR_STEPS = 1500, 900, 600  # on tidy responses, then on garbled ones too, then also going on after a reflection
LONGEST_RESPONSE = 40
FEEDBACK_TOKENS = len("yes; wait, no slip; so: ") + task.ANSWER_TOKENS
SMOOTHING = 0.35
VOWELS = "aeiou"
SLIPS = {True: 0.95, False: 0.6}
"""Whether a letter is a vowel → how often the student is shown another instead: one of the next six, at random."""
MENTOR_SLIPS = {True: 0.1, False: 0.1}
"""The same for the mentor when it is asked for the answer: two words in five are without."""

BOUNDS = {
    ("teacher", False): (0.95, 1.0),
    ("teacher", True): (0.95, 1.0),
    ("student", False): (0.05, 0.20),
    ("student", True): (0.90, 1.0),
}
"""(model, whether it is shown the answer) → lowest and highest greedy accuracy on the held-out words."""
MENTOR_BOUND = 0.95
"""Lowest share of held-out words on which its feedback has the right form and the right answer, for each kind of
response. Its opinion of the response is not counted: it hardly learns that, and finds "a slip" in most."""
MENTOR_FORM = re.compile(r"(yes; wait, no slip|no; wait, a slip); so: ([a-z]+)")


def fresh_model(name: str, tok: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained "student" (0.1 M parameters, tied embeddings), "mentor" (0.4 M, untied) or "teacher" (0.7 M,
    untied)."""
    hidden, layers, width = {"student": (64, 2, 176), "teacher": (128, 4, 256), "mentor": (96, 4, 192)}[name]
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


class Example(NamedTuple):
    """A prompt, the text that follows it as input, and the targets there (of the same length).

    They differ where the model must continue correctly after a mistake.
    """

    prompt: str
    written: str
    target: str
    given: str = ""
    """Precedes `written` in the model's own turn, without targets."""


def chat_ids(tok: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a one-turn chat that waits for the answer."""
    chat = [{"role": "user", "content": prompt}]
    text = tok.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return list(tok.encode(text))


def padded(sequences: Sequence[list[int]], pad: int) -> torch.Tensor:
    """[B, T] int64, padded on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([s + [pad] * (longest - len(s)) for s in sequences])


def supervised_loss(
    model: LlamaForCausalLM,
    tok: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy over the targets, including the end of sequence."""
    inputs, labels = [], []
    for example in examples:
        asked, end = chat_ids(tok, example.prompt) + tok.encode(example.given), [tok.eos_token_id]
        inputs.append(asked + tok.encode(example.written) + end)
        labels.append([-100] * len(asked) + tok.encode(example.target) + end)
    logits = model(input_ids=padded(inputs, tok.pad_token_id)).logits  # right padding: the causal mask hides it
    wanted_ids = padded(labels, -100)[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted_ids, label_smoothing=label_smoothing)


@torch.no_grad()
def greedy(
    model: LlamaForCausalLM,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_tokens: int = task.ANSWER_TOKENS,
) -> list[str]:
    """The most likely completion of each prompt, as text up to the end of sequence."""
    asked = [chat_ids(tok, prompt) for prompt in prompts]
    longest = max(map(len, asked))
    inputs = torch.tensor([[tok.pad_token_id] * (longest - len(ids)) + ids for ids in asked])  # generate() pads left
    real = torch.arange(longest) >= torch.tensor([[longest - len(ids)] for ids in asked])
    output = model.generate(  # type: ignore[misc]  # transformers annotates its self with a protocol
        inputs, attention_mask=real.long(), do_sample=False, max_new_tokens=max_tokens
    )
    completions = torch.as_tensor(output)[:, longest:].tolist()
    ended = [list(itertools.takewhile(lambda token: token != tok.eos_token_id, ids)) for ids in completions]
    return tok.batch_decode(ended, skip_special_tokens=False)


def accuracy(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerBase, examples: Sequence[dict[str, str]], *, hinted: bool
) -> float:
    """Share of `examples` that the model answers exactly, greedily, with the answer in the prompt or without."""
    prompts = [task.hinted_prompt(e) if hinted else e["prompt"] for e in examples]
    answers = greedy(model, tok, prompts)
    return sum(a == e["answer"] for a, e in zip(answers, examples, strict=True)) / len(examples)


def with_slips(text: str, draw: random.Random, rates: Mapping[bool, float] = SLIPS) -> str:
    """`text` with letters replaced, at the given `rates`, by one of the six that follow them in the alphabet.

    A model that learns this at the student's rates and decodes greedily writes the right consonants, since each wrong
    one is rarer, and wrong vowels; of its samples nearly every word is wrong.
    """
    letters = task.LETTERS
    return "".join(
        letters[(letters.index(c) + 1 + int(draw.random() * 6)) % 26] if draw.random() < rates[c in VOWELS] else c
        for c in text
    )


def teacher_example(word: str, draw: random.Random) -> Example:
    """The right answer, in half of the cases after another writer's slips; every third prompt has the hint."""
    example = task.row(word, "")
    prompt = task.hinted_prompt(example) if draw.random() < 1 / 3 else example["prompt"]
    written = with_slips(example["answer"], draw) if draw.random() < 1 / 2 else example["answer"]
    return Example(prompt, written, example["answer"])


def student_example(word: str, draw: random.Random, *, slips: bool) -> Example:
    """The right answer where the prompt has the hint (half of the cases); else one with slips, if `slips`."""
    example = task.row(word, "")
    if draw.random() < 1 / 2:
        return Example(task.hinted_prompt(example), example["answer"], example["answer"])
    answer = with_slips(example["answer"], draw) if slips else example["answer"]
    return Example(example["prompt"], answer, answer)


def mentor_example(word: str, draw: random.Random, *, garbled: bool, goes_on: bool) -> Example:
    """In half of the cases an answer, with slips. Else feedback: on a right answer, on one as the student gives it, or
    on one with a single wrong letter or length.

    If `goes_on`, half of the answers are given with slips and a reflection after them, and the target is the right
    answer: the model can use a reflection of its own, but is not taught to write one. If `garbled`, half of the
    responses continue with arbitrary text, like those of a student that training has damaged. In a third of the cases
    the answer follows another one and feedback on that, since a student that has learnt to reflect is judged on its
    whole completion.
    """
    example = task.row(word, "")
    if draw.random() < 1 / 2:
        answer = with_slips(example["answer"], draw, MENTOR_SLIPS)
        if goes_on and draw.random() < 1 / 2:
            _, reflection, _ = task.feedback(example, answer).split("; ")
            right = example["answer"]
            return Example(example["prompt"], right, right, given=f"{answer} {reflection} {task.CONCLUSION}")
        return Example(example["prompt"], answer, answer)
    response = some_response(example["answer"], draw)
    if draw.random() < 1 / 3:
        _, reflection, _ = task.feedback(example, some_response(example["answer"], draw)).split("; ")
        response = f"{some_response(example['answer'], draw)} {reflection} {task.CONCLUSION}{response}"
    if garbled and draw.random() < 1 / 2:
        rest = task.LETTERS if draw.random() < 1 / 2 else tokenizer.CHARACTERS.rstrip()
        start, length = int(draw.random() * (len(response) + 1)), int(draw.random() * 40)
        response = (response[:start] + "".join(draw.choices(rest, k=length)))[:LONGEST_RESPONSE]
    feedback = task.feedback(example, response)
    return Example(task.mentor_prompt(example, response), feedback, feedback)


def some_response(answer: str, draw: random.Random) -> str:
    """`answer`, or it with many slips, with one wrong letter, or with a letter too many or too few."""
    kind, at = draw.random(), int(draw.random() * len(answer))
    letter = task.LETTERS[int(draw.random() * 26)]
    if kind < 0.3:
        return answer
    if kind < 0.6:
        return with_slips(answer, draw)
    if kind < 0.9:
        return answer[:at] + letter + answer[at + 1 :]
    return answer[:at] + answer[at + 1 :] if kind < 0.95 else answer[:at] + letter + answer[at:]


def train(
    model: LlamaForCausalLM,
    tok: PreTrainedTokenizerBase,
    example: Callable[[str, random.Random], Example],
    *,
    steps: int,
    lr: float,
    label_smoothing: float,
    seed: int,
) -> None:
    """Supervised training of `model` in place, on new words at every step, with a cosine learning rate."""
    draw, source = random.Random(seed), task.words("train", seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        warm_up, decay = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * warm_up * max(0.05, decay)
        loss = supervised_loss(model, tok, [example(next(source), draw) for _ in range(BATCH)], label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def make_teacher(tok: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A model that solves the task, and that smoothed labels keep from being certain of it."""
    torch.manual_seed(seed)
    model = fresh_model("teacher", tok)
    train(model, tok, teacher_example, steps=TEACHER_STEPS, lr=2e-3, label_smoothing=SMOOTHING, seed=seed)
    return model


def make_student(tok: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A model that solves the task with the hint, and slips at most letters without it."""
    torch.manual_seed(seed)
    model = fresh_model("student", tok)
    for slips, steps, lr in zip((False, True), STUDENT_STEPS, (3e-3, 2e-3), strict=True):
        example = functools.partial(student_example, slips=slips)
        train(model, tok, example, steps=steps, lr=lr, label_smoothing=0.0, seed=seed + 1 + slips)
    return model


def make_mentor(tok: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A model that answers with slips, writes `task.feedback` on an answer, and can continue after a reflection."""
    torch.manual_seed(seed)
    model = fresh_model("mentor", tok)
    for phase, (steps, lr) in enumerate(zip(MENTOR_STEPS, (3e-3, 2e-3, 1e-3), strict=True)):
        example = functools.partial(mentor_example, garbled=phase > 0, goes_on=phase > 1)
        train(model, tok, example, steps=steps, lr=lr, label_smoothing=0.0, seed=seed + phase)
    return model


def mentor_accuracy(folder: Path, examples: Sequence[dict[str, str]]) -> dict[str, tuple[float, float]]:
    """Kind of response → shares of `examples` on which the mentor in `folder`, greedily, writes feedback of the right
    form with the right answer, and on which it is word for word `task.feedback`: the right opinion too."""
    mentor = LlamaForCausalLM.from_pretrained(folder / "mentor", dtype=torch.float32)
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(folder / "mentor")
    answers, draw = [e["answer"] for e in examples], random.Random(0)
    slips = [with_slips(answer, draw) for answer in answers]
    responses = {
        "the right answer": answers,
        "slips": slips,
        "the student's": greedy(student, tok, [e["prompt"] for e in examples]),
        "garbled": [a[: i % 7] + "".join(draw.choices(task.LETTERS, k=20)) for i, a in enumerate(answers)],
        "after a reflection": [f"{s} wait, a slip so: {a}" for s, a in zip(slips, answers, strict=True)],
    }
    found = {}
    for kind, given in responses.items():
        asked = [task.mentor_prompt(e, response) for e, response in zip(examples, given, strict=True)]
        got = greedy(mentor, tok, asked, FEEDBACK_TOKENS)
        read = [MENTOR_FORM.fullmatch(text) for text in got]
        right = [m is not None and m[2] == answer for m, answer in zip(read, answers, strict=True)]
        exact = [g == task.feedback(e, response) for g, e, response in zip(got, examples, given, strict=True)]
        found[kind] = sum(right) / len(examples), sum(exact) / len(examples)
    return found


def check(folder: Path, examples: Sequence[dict[str, str]]) -> bool:
    """Measure the models in `folder` on `examples`, print the results, return whether all are within their bounds."""
    passed = True
    for (name, hinted), (low, high) in BOUNDS.items():
        model = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        tok = AutoTokenizer.from_pretrained(folder / name)
        got = accuracy(model, tok, examples, hinted=hinted)
        good = low <= got <= high
        form = "hinted" if hinted else "plain"
        print(f"{name} {form}: {got:.3f} (expected {low} to {high}){'' if good else '  OUT OF BOUNDS'}")
        passed = passed and good
    for kind, (got, exact) in mentor_accuracy(folder, examples).items():
        good = got >= MENTOR_BOUND
        print(
            f"mentor on {kind}: {got:.3f} (expected {MENTOR_BOUND} to 1.0){'' if good else '  OUT OF BOUNDS'}, with "
            f"the right opinion {exact:.3f}"
        )
        passed = passed and good
    return passed


MAKERS = {"student": make_student, "teacher": make_teacher, "mentor": make_mentor}


def main() -> int:
    """Make or check; the exit code is 1 when a model misses its bounds."""
    parser = argparse.ArgumentParser(prog="python -m rlkd.builtin.make", description="Make or check the tiny models.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="train all into DIR, then check")
    action.add_argument("--check", type=Path, metavar="DIR", help="only measure the models of this folder")
    parser.add_argument("--only", choices=MAKERS, help="with --out: train this one; the others must be there")
    parser.add_argument("--seed", type=int, default=0, help="of weights and words (default 0, as packaged)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in a fixed order: the same seed gives the same weights
    if arguments.check is not None:
        return 0 if check(arguments.check, task.rows("heldout")) else 1
    tok = tokenizer.build()
    for name, make in MAKERS.items():
        if arguments.only not in (None, name):
            continue
        print(f"training the {name}", flush=True)
        make(tok, arguments.seed).save_pretrained(arguments.out / name)
        tok.save_pretrained(arguments.out / name)
    return 0 if check(arguments.out, task.rows("heldout")) else 1


if __name__ == "__main__":
    sys.exit(main())
