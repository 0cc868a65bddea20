"""Several teachers: a column of the data selects the teacher of each prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampling
from rlkd.losses.lm_head import OutputLayer
from rlkd.teachers.teacher import FixedTeacher, ScoreRequest, Teacher
from rlkd.types import Completion, Signal, TeacherScores

Answer = TypeVar("Answer")


class RoutedTeacher(FixedTeacher):
    """Implements `Teacher`: passes each question to the teacher named in its data."""

    def __init__(self, column: str, teachers: Mapping[str, Teacher]) -> None:
        self.column = column
        self.teachers = dict(teachers)

    @property
    def in_process(self) -> bool:
        return any(teacher.in_process for teacher in self.teachers.values())

    def start(self) -> None:
        """Start all teachers."""
        for teacher in self.teachers.values():
            teacher.start()

    def open(self) -> None:
        """Open all teachers."""
        for teacher in self.teachers.values():
            teacher.open()

    def close(self) -> None:
        """Close all teachers."""
        for teacher in self.teachers.values():
            teacher.close()

    def score(self, questions: Sequence[ScoreRequest], signal: Signal) -> list[TeacherScores]:
        """See `Teacher.score`. `TeacherScores.teacher` is the index of the teacher that scored."""
        scores = self._ask(questions, lambda teacher, part: teacher.score(part, signal))
        index = {name: i for i, name in enumerate(self.teachers)}
        return [replace(s, teacher=index[self._name(q)]) for q, s in zip(questions, scores, strict=True)]

    def layers(self) -> tuple[OutputLayer, ...]:
        """The output layers of all teachers, in order."""
        return tuple(layer for teacher in self.teachers.values() for layer in teacher.layers())

    def write(self, questions: Sequence[ScoreRequest], sampling: Sampling, iteration: int) -> list[Completion]:
        """See `Teacher.write`."""
        return self._ask(questions, lambda teacher, part: teacher.write(part, sampling, iteration))

    def _name(self, question: ScoreRequest) -> str:
        """The name of the teacher that a question goes to. Raises: RunStopped if the data names an unknown teacher."""
        name = question.meta.get(self.column)
        if name not in self.teachers:
            raise RunStopped(
                f"teacher.column: expected {self.column!r} to be one of {', '.join(self.teachers)} in every prompt, "
                f"got {name!r}; change the data, or add that teacher"
            )
        return str(name)

    def _ask(
        self, questions: Sequence[ScoreRequest], act: Callable[[Teacher, list[ScoreRequest]], Sequence[Answer]]
    ) -> list[Answer]:
        """Pass each teacher its questions, and return all answers in the order of `questions`."""
        names = [self._name(question) for question in questions]
        answers = {
            name: iter(act(teacher, [q for q, its_name in zip(questions, names, strict=True) if its_name == name]))
            for name, teacher in self.teachers.items()
            if name in names
        }
        return [next(answers[name]) for name in names]
