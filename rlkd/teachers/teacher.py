"""The protocol that every teacher implements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampling
from rlkd.losses.lm_head import OutputLayer
from rlkd.models.weights import Weights
from rlkd.types import Completion, Signal, TeacherScores


@dataclass(frozen=True)
class ScoreRequest:
    """A request to a teacher about one rollout."""

    prompt: Sequence[int]
    """The prompt's token ids as the teacher reads them."""
    completion: Sequence[int] = ()
    """Token ids to score; empty if the teacher is to write."""
    ids: Tensor | None = field(default=None, compare=False)  # [L, K]
    """Extra token ids to score at each completion position; −1: padding."""
    name: str = ""
    """A stable name; the teacher's sampling noise is a function of it."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the data, which select one of several teachers."""


def check_scorable(questions: Sequence[ScoreRequest]) -> None:
    """Check that every question has a prompt, from which the first token is predicted, and a completion.

    Raises: ValueError otherwise.
    """
    for question in questions:
        if not question.prompt or not question.completion:
            raise ValueError(
                f"a teacher scores a prompt with a completion: expected at least 1 token of each, got "
                f"{len(question.prompt)} and {len(question.completion)}"
            )


class Teacher(Protocol):
    """Scores given token ids and writes completions. It is frozen, and never a submodule of the student."""

    def start(self) -> None:
        """Begin slow operations, such as starting a server, without waiting. Every rank calls it before `open`."""
        ...

    def open(self) -> None:
        """Load the model or connect to the server. Every rank calls it after the process group exists."""
        ...

    def score(self, questions: Sequence[ScoreRequest], signal: Signal) -> list[TeacherScores]:
        """The scores that `signal` requests for every completion token, given all tokens before it."""
        ...

    def layers(self) -> tuple[OutputLayer, ...]:
        """The output layers that belong to the hidden states in its scores; () if it returns none."""
        ...

    def write(self, questions: Sequence[ScoreRequest], sampling: Sampling, iteration: int) -> list[Completion]:
        """One completion of each prompt. The sample is a function of (sampling.seed, iteration, question.name)."""
        ...

    def close(self) -> None:
        """Release the model, or the servers and connections."""
        ...

    @property
    def in_process(self) -> bool:
        """Whether a model of it is in this process; False if all are on servers."""
        ...

    @property
    def follows(self) -> bool:
        """Whether `publish` changes it."""
        ...

    @property
    def moves(self) -> bool:
        """Whether its scores change with the weights that are published, by `publish` or at the policy's servers."""
        ...

    def publish(self, weights: Weights, version: int) -> None:
        """Follow the student, whose `weights`, under the names in memory, are those after `version` iterations.

        A collective.
        """
        ...

    def save(self, folder: Path) -> None:
        """Keep in a checkpoint's folder what a resumed run cannot recompute."""
        ...

    def restore(self, folder: Path, version: int) -> None:
        """Be as `save` left it after iteration `version`."""
        ...


class AsyncTeacher(Protocol):
    """A teacher as an algorithm sees it: it answers one group, while other groups are under way."""

    async def score(self, questions: Sequence[ScoreRequest], signal: Signal) -> list[TeacherScores]:
        """See `Teacher.score`."""
        ...

    async def write(self, questions: Sequence[ScoreRequest], sampling: Sampling, iteration: int) -> list[Completion]:
        """See `Teacher.write`."""
        ...


class FixedTeacher:
    """The part of the protocol that is the same for most teachers whose weights stay as they are.

    In this process, with nothing to load, no hidden states and no text of its own, `score` is all that is missing.
    """

    @property
    def in_process(self) -> bool:
        return True

    def start(self) -> None:
        """There is nothing to start."""

    def open(self) -> None:
        """There is nothing to load."""

    def close(self) -> None:
        """There is nothing to release."""

    def layers(self) -> tuple[OutputLayer, ...]:
        """None, since its scores have no hidden states."""
        return ()

    def write(self, questions: Sequence[ScoreRequest], sampling: Sampling, iteration: int) -> list[Completion]:
        """Raises: RunStopped, since it only scores."""
        raise RunStopped(
            f"teacher.backend: expected a teacher that writes, got {type(self).__name__}, which only scores; choose "
            "another teacher, or define its write"
        )

    @property
    def follows(self) -> bool:
        return False

    @property
    def moves(self) -> bool:
        return self.follows

    def publish(self, weights: Weights, version: int) -> None:
        """Nothing changes."""

    def save(self, folder: Path) -> None:
        """There is nothing to keep."""

    def restore(self, folder: Path, version: int) -> None:
        """There is nothing to restore."""
