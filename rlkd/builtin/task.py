"""Reverse a word: every answer can be checked exactly, and a 100,000-parameter model can learn it.

The hash of a word decides whether it is held out, so that no lists of words have to be kept apart.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Literal

Split = Literal["train", "heldout"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST, LONGEST = 7, 10
SIZES: dict[Split, int] = {"train": 4000, "heldout": 256}
ANSWER_TOKENS = LONGEST + 1
"""Characters of the longest answer, and its end of sequence."""

HINT_TEMPLATE = "{prompt} hint: {privileged}"
"""The prompt of a teacher that sees the answer (self-distillation). A config may contain a copy of it."""

MENTOR_TEMPLATE = "{question} answer: {response}"
"""The mentor's prompt. A config contains a copy of it."""
MARKER, CONCLUSION = "wait", "so: "
"""Only the mentor writes these: the start of its reflection, and the words before its answer."""


def split_of(word: str) -> Split:
    """The part that `word` belongs to: one word in sixteen is held out."""
    return "heldout" if hashlib.sha256(word.encode()).digest()[0] % 16 == 0 else "train"


def words(split: Split, seed: int = 0) -> Iterator[str]:
    """Distinct words of `split`, without end, in an order that depends on `seed` only."""
    draw = random.Random(seed)
    seen: set[str] = set()
    while True:
        length = SHORTEST + int(draw.random() * (LONGEST - SHORTEST + 1))
        word = "".join(LETTERS[int(draw.random() * len(LETTERS))] for _ in range(length))
        if split_of(word) == split and word not in seen:
            seen.add(word)
            yield word


def row(word: str, name: str) -> dict[str, str]:
    """One example: {"id", "prompt", "answer", "privileged"}. The answer is itself the reference solution."""
    answer = word[::-1]
    return {"id": name, "prompt": f"reverse: {word}", "answer": answer, "privileged": answer}


def rows(split: Split) -> list[dict[str, str]]:
    """All examples of `split`, the same ones in the same order at every call.

    Raises: ValueError for an unknown split.
    """
    if split not in SIZES:
        raise ValueError(f"the built-in task has no split {split!r}; choose one of {', '.join(SIZES)}")
    source = words(split)
    return [row(next(source), f"{split}-{i}") for i in range(SIZES[split])]


def hinted_prompt(example: Mapping[str, str]) -> str:
    """The prompt of `example` with its reference answer in it, e.g. "reverse: kfbqe hint: eqbfk"."""
    return HINT_TEMPLATE.format(prompt=example["prompt"], privileged=example["privileged"])


def mentor_prompt(example: Mapping[str, str], response: str) -> str:
    """The mentor's prompt, e.g. "reverse: kfbqe answer: eqafk"."""
    return MENTOR_TEMPLATE.format(question=example["prompt"], response=response)


def feedback(example: Mapping[str, str], response: str) -> str:
    """The mentor's training target: opinion; reflection; right answer. It judges the text after the last "so: ".

    Example: "no; wait, a slip; so: eqbfk", or "yes; wait, no slip; so: eqbfk".
    """
    right = response.rsplit(CONCLUSION, 1)[-1] == example["answer"]
    opinion, slip = ("yes", "no slip") if right else ("no", "a slip")
    return f"{opinion}; {MARKER}, {slip}; {CONCLUSION}{example['answer']}"
