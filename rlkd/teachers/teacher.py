"""The protocol that every teacher keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlkd.generation.sampler import Sampling
from rlkd.losses.lm_head import OutputLayer
from rlkd.types import Completion, Signal, TeacherScores


@dataclass(frozen=True)
class Question:
    """What a teacher is asked about one rollout."""

    prompt: Sequence[int]
    """Token ids as the teacher reads them."""
    completion: Sequence[int] = ()
    """Token ids to be scored; none where the teacher is to write."""
    ids: Tensor | None = field(default=None, compare=False)  # [L, K]
    """Other tokens to be scored at the place of each of the completion; −1: none."""
    name: str = ""
    """What is drawn for it is a function of this."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the data; they choose among several teachers."""


def check_scorable(questions: Sequence[Question]) -> None:
    """Raises: ValueError for a question without a prompt (the first token has no past) or without a completion."""
    for question in questions:
        if not question.prompt or not question.completion:
            raise ValueError(
                f"a teacher needs a prompt and a completion, got {len(question.prompt)} and "
                f"{len(question.completion)} tokens"
            )


class Teacher(Protocol):
    """Scores token ids that somebody else wrote, and writes some. Frozen; never a submodule of the student."""

    def start(self) -> None:
        """Begin what takes long, such as starting a server, without waiting. Every rank calls it, before `open`."""
        ...

    def open(self) -> None:
        """Load the model or connect to the server. Every rank calls it, after the process group exists."""
        ...

    def score(self, questions: Sequence[Question], signal: Signal) -> list[TeacherScores]:
        """What `signal` asks for, of every token of each completion given all before it."""
        ...

    def layers(self) -> tuple[OutputLayer, ...]:
        """The output layers for the hidden states in its scores; () where it gives none."""
        ...

    def write(self, questions: Sequence[Question], sampling: Sampling, iteration: int) -> list[Completion]:
        """One completion after each prompt. What is drawn is a function of (sampling.seed, iteration, name)."""
        ...

    def close(self) -> None:
        """Free what `open` took."""
        ...

    @property
    def follows(self) -> bool:
        """Whether `publish` changes it."""
        ...

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Follow the student, whose full `weights` are those after `version` iterations."""
        ...

    def save(self, folder: Path) -> None:
        """Keep in a checkpoint's folder what a resumed run cannot recompute."""
        ...

    def restore(self, folder: Path, version: int) -> None:
        """Be as `save` left it after iteration `version`."""
        ...


class FixedTeacher:
    """The part of the protocol of every teacher whose weights stay as they are."""

    @property
    def follows(self) -> bool:
        return False

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Nothing changes."""

    def save(self, folder: Path) -> None:
        """There is nothing to keep."""

    def restore(self, folder: Path, version: int) -> None:
        """There is nothing to restore."""
