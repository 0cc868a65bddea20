"""The data that the stages of an iteration pass on: prompts → rollouts → scored rollouts → one Batch.

Every class is frozen and keyword-only. Before the Batch nearly everything is Python tuples and floats; the Batch is the
only place where they become tensors.

Every `[B, T]` tensor follows one convention: column t is about token t given the tokens before it. Column 0 has no
preceding tokens and is never trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rlkd.losses.lm_head import OutputLayer
from rlkd.metrics import Meter

FinishReason = Literal["stop", "length"]
"""`stop`: the last token is the end-of-sequence token that the author chose. `length`: the token limit was reached."""

Author = Literal["student", "teacher", "glue", "data"]
"""Where a token comes from: the student sampled it, a teacher wrote it, it joins two parts, or it is from the data."""
AUTHORS: tuple[Author, ...] = get_args(Author)
"""The index of an author in this tuple is its code in `Batch.authors`."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task for the student.

    Example: Prompt(id="train-17", messages=({"role": "user", "content": "reverse: abc"},), token_ids=(1, 9, 4),
    answer="cba")
    """

    id: str
    """A stable name. The sampling noise is a function of it."""
    messages: tuple[Mapping[str, Any], ...]
    """Each has `role`, `content` (may be null if there are tool calls) and any other keys from the data."""
    token_ids: tuple[int, ...]
    """The prompt as the student reads it, with the chat template applied."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template: `tools` and data.template_variables."""
    answer: str | None = None
    """The reference answer that rewards compare with."""
    privileged: str | None = None
    """Text that only a teacher may see, such as a reference solution."""
    completion: tuple[int, ...] | None = None
    """A completion from the data to imitate, including the end-of-sequence token."""
    rejected: tuple[int, ...] | None = None
    """A completion from the data to avoid, including the end-of-sequence token."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the data."""

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
    """One completion and what the sampler reported about it."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """The completion, end-of-sequence token included where one was sampled."""
    logprobs: tuple[float | None, ...]
    """The sampler's log-probs at its temperature; None for tokens that the student did not sample."""
    weight_versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    segments: tuple[Segment, ...] = ()
    """The author of each part; empty if the student wrote everything."""
    top_ids: Tensor | None = field(default=None, compare=False)  # [L, K] int64
    """The sampler's K most likely tokens at each position, if `Sampling.top_k` asked for them."""

    def __post_init__(self) -> None:
        where = f"a rollout of prompt {self.prompt.id!r}"
        if not self.token_ids:
            raise ValueError(f"{where} has no tokens")
        if len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{where} has {len(self.token_ids)} tokens but {len(self.logprobs)} log-probs")
        assert self.top_ids is None or len(self.top_ids) == len(self.token_ids), "expected top_ids [L, K]"
        for position, (logprob, by_student) in enumerate(zip(self.logprobs, self.student_tokens(), strict=True)):
            if by_student and (logprob is None or not math.isfinite(logprob)):
                raise ValueError(f"{where}: token {position} was sampled by the student, but its log-prob is {logprob}")
        covered = [t for span in self.weight_versions for t in range(span.start, span.end)]
        if covered != [t for t, by_student in enumerate(self.student_tokens()) if by_student]:
            raise ValueError(f"{where}: weight versions must cover each of the student's tokens once, in order")

    def authors(self) -> tuple[Author, ...]:
        """The author of each token."""
        found: list[Author] = ["student"] * len(self.token_ids)
        for segment in self.segments:
            found[segment.start : segment.end] = [segment.author] * (segment.end - segment.start)
        return tuple(found)

    def student_tokens(self) -> tuple[bool, ...]:
        """Whether the student sampled each token."""
        return tuple(author == "student" for author in self.authors())

    @property
    def oldest_version(self) -> int | None:
        """The oldest weight version that sampled a token; None if the student sampled none."""
        return min((span.version for span in self.weight_versions), default=None)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A continuation of a prompt by any model, the student or a teacher."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The log-probs of these tokens at the sampling temperature."""
    finish_reason: FinishReason
    top_ids: Tensor | None = field(default=None, compare=False)
    """See `Rollout.top_ids`."""


def written(prompt: Prompt, token_ids: Sequence[int], author: Author, finish_reason: FinishReason) -> Rollout:
    """A completion of `prompt` that the student did not sample; `author` wrote all of it."""
    return Rollout(
        prompt=prompt,
        token_ids=tuple(token_ids),
        logprobs=(None,) * len(token_ids),
        weight_versions=(),
        finish_reason=finish_reason,
        segments=(Segment(start=0, end=len(token_ids), author=author),),
    )


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What the teacher returns for each completion token."""

    tier: Literal["sampled", "top_k", "given", "hidden"] = "sampled"
    """sampled: the log-prob of the completion token; top_k: also the teacher's k most likely tokens; given: also the
    log-probs of the token ids in the request; hidden: also the teacher's last hidden state, from which its output layer
    computes the full distribution."""
    k: int = 0
    """The k of top_k."""


@dataclass(frozen=True, kw_only=True)
class TeacherScores:
    """A teacher's scores of the L completion tokens of one rollout."""

    logprobs: tuple[float, ...]
    """log π_T(token t | the teacher's prompt, the tokens before t), one per completion token."""
    top_ids: Tensor | None = None  # [L, K] int64: the most likely tokens first, or the given ids; −1: no such token
    top_logprobs: Tensor | None = None  # [L, K] fp32
    hidden: Tensor | None = None  # [L, H]: row t is the hidden state from which the teacher predicts token t
    teacher: int = 0
    """The index of the teacher, if there are several."""

    def __post_init__(self) -> None:
        for position, logprob in enumerate(self.logprobs):
            if not math.isfinite(logprob):
                raise ValueError(f"the teacher's log-prob of completion token {position} is {logprob}")
        for name in ("top_ids", "top_logprobs", "hidden"):
            value = getattr(self, name)
            assert value is None or (value.dim() == 2 and len(value) == len(self.logprobs)), f"expected {name} [L, …]"


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout with its reward, its teacher's scores and its advantage."""

    rollout: Rollout
    reward: float | None
    """None if the reward could not be computed or the algorithm uses none. In the first case `error` has the reason,
    and the sample is masked; a failed reward never counts as 0."""
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)
    advantage: float = 0.0
    teacher: TeacherScores | None = None
    reference: TeacherScores | None = None
    """The same tokens scored by the frozen initial student, if the loss has a KL term to it."""
    distil: tuple[bool, ...] | None = None
    """Whether the distillation term acts on each completion token; None without distillation."""
    error: str | None = None
    """Why the reward could not be computed."""
    feedback: str | None = None
    """Written feedback from the rewards."""

    def __post_init__(self) -> None:
        length = len(self.rollout.token_ids)
        for name, scores in (("teacher", self.teacher), ("reference", self.reference)):
            if scores is not None and len(scores.logprobs) != length:
                raise ValueError(f"the {name} scored {len(scores.logprobs)} tokens of a completion of {length}")
        if self.distil is not None and len(self.distil) != length:
            raise ValueError(f"distil has {len(self.distil)} entries for a completion of {length}")

        if self.distil is not None and any(self.distil) and self.teacher is None:
            raise ValueError("distil marks tokens that no teacher scored")

    def is_correct(self, correct_at: float) -> bool | None:
        """Whether the reward is at least `correct_at`, up to the rounding of a weighted sum; None without a reward."""
        return None if self.reward is None else self.reward >= correct_at - 1e-6


_PER_ROW = ("lengths", "rewards", "weight_version", "teacher_index")
_PER_TOKEN_VECTORS = ("teacher_top_ids", "teacher_top_logprobs", "teacher_hidden")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's rollouts as tensors; the trainer sees nothing else of them. Rows are right-padded to a common T."""

    iteration: int
    """The number of iterations completed before this one. Schedules are functions of it."""
    input_ids: Tensor  # [B, T] int64: prompt, completion, padding
    lengths: Tensor  # [B] int64: prompt + completion tokens
    completion_mask: Tensor  # [B, T] bool: completion tokens of samples that count
    student_mask: Tensor  # [B, T] bool: those completion tokens that the student sampled
    authors: Tensor  # [B, T] int64: the token's author as an index into AUTHORS; only valid on completion_mask
    sampler_logprobs: Tensor  # [B, T] fp32, at the rollout temperature; only valid on student_mask
    advantages: Tensor  # [B, T] fp32
    rewards: Tensor  # [B] fp32; NaN for rows without a reward
    weight_version: Tensor  # [B] int64: the oldest weight version that sampled a token of the row; −1 if none did
    old_logprobs: Tensor | None = None  # [B, T] by the trainer, at the start of the iteration
    teacher_logprobs: Tensor | None = None  # [B, T], at the teacher's temperature
    teacher_top_ids: Tensor | None = None  # [B, T, K] int64
    teacher_top_logprobs: Tensor | None = None  # [B, T, K]
    teacher_hidden: Tensor | None = None  # [B, T, H]: column t: the hidden state from which token t is predicted
    teacher_index: Tensor | None = None  # [B] int64: the row's index into `teacher_layers`
    teacher_layers: tuple[OutputLayer, ...] = ()
    reference_logprobs: Tensor | None = None  # [B, T], at the rollout temperature
    distil_mask: Tensor | None = None  # [B, T] bool: tokens on which the distillation term acts
    weights: Tensor | None = None  # [B, T] weights of the policy term, made once per update from global counts
    distil_weights: Tensor | None = None  # [B, T] weights of the distillation term
    token_weights: Tensor | None = None  # [B, T] 1/N on every completion token, for logged means
    student_weights: Tensor | None = None  # [B, T] 1/N on every token that the student sampled, for logged means
    metrics: Meter = field(default_factory=Meter)
    """Metrics of this rank's rollouts that are known before training."""

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        assert len(shape) == 2, f"expected input_ids [B, T], got {tuple(shape)}"
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                expected = shape[:1] if f.name in _PER_ROW else shape
                got = value.shape[:2] if f.name in _PER_TOKEN_VECTORS else value.shape
                assert got == expected, f"expected {f.name} {tuple(expected)}, got {tuple(value.shape)}"
        columns = torch.arange(shape[1], device=self.input_ids.device)
        real = columns < self.lengths[:, None]
        assert not bool((self.completion_mask & ~real).any()), "completion_mask covers padding"
        assert not bool(self.completion_mask[:, 0].any()), "column 0 has no preceding tokens and cannot be trained"
        assert not bool((self.student_mask & ~self.completion_mask).any()), "student_mask exceeds completion_mask"
        if self.distil_mask is not None:
            assert not bool((self.distil_mask & ~self.completion_mask).any()), "distil_mask exceeds completion_mask"

    def to(self, device: torch.device | str, **kwargs: Any) -> Batch:
        """The same batch on `device`. Lightning calls this on a custom batch.

        Per-token vectors stay where they are, so that the device need not hold all hidden states of an iteration.
        """
        moved = {
            f.name: getattr(self, f.name).to(device, **kwargs)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor) and f.name not in _PER_TOKEN_VECTORS
        }
        layers = tuple(layer.to(device) for layer in self.teacher_layers)
        return dataclasses.replace(self, teacher_layers=layers, **moved)

    def rows(self, index: Tensor) -> Batch:
        """The rows `index` [b], cut to the longest of them. The metrics stay with the full batch."""
        length = int(self.lengths[index].max())
        picked: dict[str, Any] = {"metrics": Meter()}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                where = index.to(value.device)
                picked[f.name] = value[where] if f.name in _PER_ROW else value[where, :length]
        return dataclasses.replace(self, **picked)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])
