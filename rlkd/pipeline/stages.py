"""The stages of the line as coroutines: samplers and teachers, in this process or on servers, for one group at a time.

A model in this process gets its requests as batches (`Stream`), which are lists in the order of the prompts. Servers
get theirs one group at a time, from threads, as many at once as they can take.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeVar

from rlkd.generation.hf import HFSampler
from rlkd.generation.sampler import AsyncSampler, Sampler, Sampling
from rlkd.generation.vllm import VLLMSampler
from rlkd.stream import Station, Stream
from rlkd.teachers.teacher import AsyncTeacher, ScoreRequest, Teacher
from rlkd.types import Completion, Prompt, Rollout, Signal, TeacherScores

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def sampler_stage(stream: Stream, sampler: Sampler) -> AsyncSampler:
    """`sampler` for coroutines of `stream`."""
    if isinstance(sampler, HFSampler):
        return BatchedSampler(stream, sampler.groups)
    if isinstance(sampler, VLLMSampler):
        return ThreadedSampler(stream, sampler)
    return BatchedSampler(stream, lambda prompts, **how: enumerate(sampler.sample(prompts, **how)))


def teacher_stages(stream: Stream, teachers: Mapping[str, Teacher]) -> dict[str, AsyncTeacher]:
    """`teachers` for coroutines of `stream`, by name, in the order in which they are asked."""
    return {
        name: BatchedTeacher(stream, teacher) if teacher.in_process else ThreadedTeacher(stream, teacher)
        for name, teacher in teachers.items()
    }


class BatchedSampler:
    """A sampler in this process. Implements `AsyncSampler`."""

    def __init__(self, stream: Stream, groups: Callable[..., Iterable[tuple[int, list[Rollout]]]]) -> None:
        """`groups`: see `HFSampler.groups`."""

        def act(asked: list[tuple[Any, Prompt]], deliver: Callable[[int, list[Rollout]], None]) -> None:
            for start, (n, iteration, sampling), prompts in _alike(asked):
                # The rewards of a group begin while others are still sampled.
                for index, group in groups(prompts, n=n, iteration=iteration, sampling=sampling):
                    deliver(start + index, group)

        self._station: Station[tuple[Any, Prompt], list[Rollout]] = Station(stream, act)

    async def sample(self, prompt: Prompt, *, n: int, iteration: int, sampling: Sampling) -> list[Rollout]:
        """See `AsyncSampler.sample`."""
        return await self._station.ask(((n, iteration, sampling), prompt))


class ThreadedSampler:
    """A sampler on servers, asked from threads. Implements `AsyncSampler`."""

    def __init__(self, stream: Stream, sampler: VLLMSampler) -> None:
        self._stream = stream
        self._sampler = sampler
        self._room: asyncio.Semaphore | None = None
        """For as many prompts as the servers take; first come, first served, so earlier iterations go first."""

    async def sample(self, prompt: Prompt, *, n: int, iteration: int, sampling: Sampling) -> list[Rollout]:
        """See `AsyncSampler.sample`."""

        def act() -> list[Rollout]:
            (group,) = self._sampler.sample([prompt], n=n, iteration=iteration, sampling=sampling)
            return group

        if self._room is None:
            self._room = asyncio.Semaphore(self._sampler.at_once(n))
        async with self._room:
            return await self._stream.in_thread(act)


class BatchedTeacher:
    """A teacher in this process. Implements `AsyncTeacher`."""

    def __init__(self, stream: Stream, teacher: Teacher) -> None:
        def write(asked: list[tuple[Any, Sequence[ScoreRequest]]], deliver: Callable[[int, Any], None]) -> None:
            _answer(asked, deliver, lambda questions, key: teacher.write(questions, *key))

        def score(asked: list[tuple[Any, Sequence[ScoreRequest]]], deliver: Callable[[int, Any], None]) -> None:
            _answer(asked, deliver, lambda questions, signal: teacher.score(questions, signal))

        self._writes: Station[tuple[Any, Sequence[ScoreRequest]], list[Completion]] = Station(stream, write)
        self._scores: Station[tuple[Any, Sequence[ScoreRequest]], list[TeacherScores]] = Station(stream, score)

    async def write(self, questions: Sequence[ScoreRequest], sampling: Sampling, iteration: int) -> list[Completion]:
        """See `AsyncTeacher.write`."""
        return await self._writes.ask(((sampling, iteration), questions)) if questions else []

    async def score(self, questions: Sequence[ScoreRequest], signal: Signal) -> list[TeacherScores]:
        """See `AsyncTeacher.score`."""
        return await self._scores.ask((signal, questions)) if questions else []


class ThreadedTeacher:
    """A teacher on servers, asked from threads. Implements `AsyncTeacher`."""

    def __init__(self, stream: Stream, teacher: Teacher) -> None:
        self._stream = stream
        self._teacher = teacher

    async def write(self, questions: Sequence[ScoreRequest], sampling: Sampling, iteration: int) -> list[Completion]:
        """See `AsyncTeacher.write`."""
        if not questions:
            return []
        return await self._stream.in_thread(lambda: self._teacher.write(questions, sampling, iteration))

    async def score(self, questions: Sequence[ScoreRequest], signal: Signal) -> list[TeacherScores]:
        """See `AsyncTeacher.score`."""
        if not questions:
            return []
        return await self._stream.in_thread(lambda: self._teacher.score(questions, signal))


def _alike(asked: Iterable[tuple[Any, Item]]) -> Iterable[tuple[int, Any, list[Item]]]:
    """Consecutive requests (key, item) with equal keys: (index of the first, key, items)."""
    start = 0
    for key, part in itertools.groupby(asked, key=itemgetter(0)):
        items = [item for _, item in part]
        yield start, key, items
        start += len(items)


def _answer(
    asked: list[tuple[Any, Sequence[ScoreRequest]]],
    deliver: Callable[[int, list[Answer]], None],
    act: Callable[[list[ScoreRequest], Any], Sequence[Answer]],
) -> None:
    """Answer the lists of questions of several groups with one call for all that have equal keys."""
    for start, key, lists in _alike(asked):
        answers = iter(act([question for questions in lists for question in questions], key))
        for index, questions in enumerate(lists, start):
            deliver(index, [next(answers) for _ in questions])
