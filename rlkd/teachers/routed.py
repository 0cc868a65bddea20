"""Several teachers: a column of the data says whose a prompt is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampling
from rlkd.losses.lm_head import OutputLayer
from rlkd.teachers.teacher import FixedTeacher, Question, Teacher
from rlkd.types import Completion, Signal, TeacherScores

Answer = TypeVar("Answer")


class RoutedTeacher(FixedTeacher):
    """Implements `Teacher` by asking, for each question, the one that its data names."""

    def __init__(self, column: str, teachers: Mapping[str, Teacher]) -> None:
        self.column = column
        self.teachers = dict(teachers)

    def start(self) -> None:
        for teacher in self.teachers.values():
            teacher.start()

    def open(self) -> None:
        for teacher in self.teachers.values():
            teacher.open()

    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()

    def score(self, questions: Sequence[Question], signal: Signal) -> list[TeacherScores]:
        scores = self._ask(questions, lambda teacher, part: teacher.score(part, signal))
        index = {name: i for i, name in enumerate(self.teachers)}
        return [replace(s, teacher=index[self._name(q)]) for q, s in zip(questions, scores, strict=True)]

    def layers(self) -> tuple[OutputLayer, ...]:
        return tuple(layer for teacher in self.teachers.values() for layer in teacher.layers())

    def write(self, questions: Sequence[Question], sampling: Sampling, iteration: int) -> list[Completion]:
        return self._ask(questions, lambda teacher, part: teacher.write(part, sampling, iteration))

    def _name(self, question: Question) -> str:
        """Raises: RunStopped for data that names no teacher of ours."""
        name = question.meta.get(self.column)
        if name not in self.teachers:
            raise RunStopped(
                f"teacher.column: a prompt has {self.column!r} = {name!r}, but the teachers are called "
                f"{', '.join(self.teachers)}"
            )
        return str(name)

    def _ask(
        self, questions: Sequence[Question], act: Callable[[Teacher, list[Question]], Sequence[Answer]]
    ) -> list[Answer]:
        """Each teacher answers its own questions; the answers come back in the order of the questions."""
        names = [self._name(question) for question in questions]
        answers = {
            name: iter(act(teacher, [q for q, whose in zip(questions, names, strict=True) if whose == name]))
            for name, teacher in self.teachers.items()
            if name in names
        }
        return [next(answers[name]) for name in names]
