"""What passes along the line: prompts → rollouts → scored rollouts → one Batch.

Every class is frozen and keyword-only. Left of the Batch there are only Python tuples and floats; the Batch is
the single place where they become tensors.

One convention for every `[B, T]` tensor: column t speaks of token t given the tokens before it. Column 0 has no
past and is never trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlkd.metrics import Meter

FinishReason = Literal["stop", "length"]
"""`stop`: the last token is the end-of-sequence token that the author chose. `length`: the budget ran out."""

Author = Literal["student", "teacher", "glue"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task for the student.

    Example: Prompt(id="train-17", messages=({"role": "user", "content": "reverse: abc"},), token_ids=(1, 9, 4),
    answer="cba")
    """

    id: str
    """Stable name; sampling noise is a function of it."""
    messages: tuple[Mapping[str, str], ...]
    token_ids: tuple[int, ...]
    """The prompt as the student reads it, chat template applied."""
    answer: str | None = None
    """What rewards compare with."""
    privileged: str | None = None
    """What only a teacher may see: a reference solution, say."""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id!r} has no token ids")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Completion tokens [start, end) written by one author."""

    start: int
    end: int
    author: Author


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """Completion tokens [start, end) sampled by the weights of one version."""

    start: int
    end: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion, with what its sampler knew of it."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """The completion, end-of-sequence token included where one was sampled."""
    logprobs: tuple[float | None, ...]
    """By the sampler, at its temperature; None on tokens that the student did not sample."""
    weight_versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    segments: tuple[Segment, ...] = ()
    """Who wrote what; empty: the student wrote all."""

    def __post_init__(self) -> None:
        where = f"a rollout of prompt {self.prompt.id!r}"
        if not self.token_ids:
            raise ValueError(f"{where} has no tokens")
        if len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{where} has {len(self.token_ids)} tokens but {len(self.logprobs)} log-probs")
        for position, (logprob, by_student) in enumerate(zip(self.logprobs, self.student_tokens(), strict=True)):
            if by_student and (logprob is None or not math.isfinite(logprob)):
                raise ValueError(f"{where}: token {position} was sampled by the student, but its log-prob is {logprob}")
        covered = [t for span in self.weight_versions for t in range(span.start, span.end)]
        if covered != [t for t, by_student in enumerate(self.student_tokens()) if by_student]:
            raise ValueError(f"{where}: weight versions must cover the student's tokens once, in order")

    def student_tokens(self) -> tuple[bool, ...]:
        """Per token, whether the student sampled it."""
        by_student = [True] * len(self.token_ids)
        for segment in self.segments:
            for t in range(segment.start, segment.end):
                by_student[t] = segment.author == "student"
        return tuple(by_student)

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.weight_versions)


@dataclass(frozen=True, kw_only=True)
class TeacherScores:
    """What a teacher thinks of the completion tokens of one rollout.

    Top-k and hidden states join here as further optional fields when a divergence needs them.
    """

    logprobs: tuple[float, ...]
    """log π_T(token t | the teacher's prompt, the tokens before t), one per completion token."""

    def __post_init__(self) -> None:
        for position, logprob in enumerate(self.logprobs):
            if not math.isfinite(logprob):
                raise ValueError(f"the teacher's log-prob of completion token {position} is {logprob}")


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout with its reward, its teacher's scores and its advantage."""

    rollout: Rollout
    reward: float | None
    """None: the reward could not be computed. The sample is masked; it is never a 0."""
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)
    advantage: float = 0.0
    teacher: TeacherScores | None = None
    reference: TeacherScores | None = None
    """The same tokens scored by the frozen start of the student, when the loss has a KL to it."""
    distil: tuple[bool, ...] | None = None
    """Per completion token, whether the distillation term acts on it; None: no distillation."""
    error: str | None = None
    """Why there is no reward."""

    def __post_init__(self) -> None:
        length = len(self.rollout.token_ids)
        for name, scores in (("teacher", self.teacher), ("reference", self.reference)):
            if scores is not None and len(scores.logprobs) != length:
                raise ValueError(f"the {name} scored {len(scores.logprobs)} tokens of a completion of {length}")
        if self.distil is not None and len(self.distil) != length:
            raise ValueError(f"distil has {len(self.distil)} entries for a completion of {length}")

    def is_correct(self, correct_at: float) -> bool | None:
        """Whether the reward reaches `correct_at`, up to the rounding of a weighted sum; None without a reward."""
        return None if self.reward is None else self.reward >= correct_at - 1e-6


@dataclass(frozen=True, kw_only=True)
class Batch:
    """All that the trainer sees of one rank's rollouts. Rows are right-padded to a common T."""

    iteration: int
    """Iterations completed before this one; schedules are functions of it."""
    input_ids: Tensor  # [B, T] int64: prompt, completion, padding
    lengths: Tensor  # [B] int64: prompt + completion tokens
    completion_mask: Tensor  # [B, T] bool: completion tokens of samples that count
    student_mask: Tensor  # [B, T] bool: of these, the tokens that the student sampled
    sampler_logprobs: Tensor  # [B, T] fp32, at the rollout temperature; meaningful on student_mask only
    advantages: Tensor  # [B, T] fp32
    rewards: Tensor  # [B] fp32, NaN where the reward failed
    weight_version: Tensor  # [B] int64: the oldest version that wrote a token of the row
    old_logprobs: Tensor | None = None  # [B, T] the trainer's own, at the start of the iteration
    teacher_logprobs: Tensor | None = None  # [B, T], at the teacher's temperature
    reference_logprobs: Tensor | None = None  # [B, T], at the rollout temperature
    distil_mask: Tensor | None = None  # [B, T] bool: tokens on which the distillation term acts
    weights: Tensor | None = None  # [B, T] of the policy term; made once an update from global counts
    distil_weights: Tensor | None = None  # [B, T] of the distillation term
    token_weights: Tensor | None = None  # [B, T] 1/N on every completion token: means for the log
    metrics: Meter = field(default_factory=Meter)
    """What is known of this rank's rollouts before training."""

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        assert len(shape) == 2, f"input_ids is {tuple(shape)}, wants [B, T]"
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                wanted = shape[:1] if f.name in ("lengths", "rewards", "weight_version") else shape
                assert value.shape == wanted, f"{f.name} is {tuple(value.shape)}, wants {tuple(wanted)}"
        columns = torch.arange(shape[1], device=self.input_ids.device)
        real = columns < self.lengths[:, None]
        assert not bool((self.completion_mask & ~real).any()), "completion_mask covers padding"
        assert not bool(self.completion_mask[:, 0].any()), "column 0 has no past and cannot be trained"
        assert not bool((self.student_mask & ~self.completion_mask).any()), "student_mask exceeds completion_mask"
        if self.distil_mask is not None:
            assert not bool((self.distil_mask & ~self.completion_mask).any()), "distil_mask exceeds completion_mask"

    def to(self, device: torch.device | str, **kwargs: Any) -> Batch:
        """The same batch with every tensor on `device` (Lightning asks for this of a custom batch)."""
        moved = {
            f.name: getattr(self, f.name).to(device, **kwargs)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def rows(self, index: Tensor) -> Batch:
        """The rows `index` [b], cut to their longest length. Metrics stay with the whole batch."""
        length = int(self.lengths[index].max())
        picked: dict[str, Any] = {"metrics": Meter()}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                picked[f.name] = value[index, :length] if value.dim() == 2 else value[index]
        return dataclasses.replace(self, **picked)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])
