"""What passes along the line: prompts → rollouts → scored rollouts → one Batch.

Every class is frozen and keyword-only. Left of the Batch there are only Python tuples and floats; the Batch is
the single place where they become tensors.

One convention for every `[B, T]` tensor: column t speaks of token t given the tokens before it. Column 0 has no
past and is never trained.
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
"""`stop`: the last token is the end-of-sequence token that the author chose. `length`: the budget ran out."""

Author = Literal["student", "teacher", "glue", "data", "environment"]
"""Who wrote a token: the student sampled it, a teacher did, it joins two parts, it is from the data set, or an
environment answered with it: then it is context, and no term of a loss acts on it."""
AUTHORS: tuple[Author, ...] = get_args(Author)
"""Their order gives the codes of `Batch.authors`."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task for the student.

    Example: Prompt(id="train-17", messages=({"role": "user", "content": "reverse: abc"},), token_ids=(1, 9, 4),
    answer="cba")
    """

    id: str
    """Stable name; sampling noise is a function of it."""
    messages: tuple[Mapping[str, Any], ...]
    """Each with `role`, `content` (null beside tool calls), and what else the data gives it."""
    token_ids: tuple[int, ...]
    """The prompt as the student reads it, chat template applied."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template gets beside the messages: `tools`, and data.template_variables."""
    answer: str | None = None
    """What rewards compare with."""
    privileged: str | None = None
    """What only a teacher may see: a reference solution, say."""
    completion: tuple[int, ...] | None = None
    """A completion to imitate, from the data, end of sequence included."""
    rejected: tuple[int, ...] | None = None
    """A completion to avoid, from the data, end of sequence included."""
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
    top_ids: Tensor | None = field(default=None, compare=False)  # [L, K] int64
    """The sampler's likeliest tokens, where `Sampling.top_k` asked for them."""

    def __post_init__(self) -> None:
        where = f"a rollout of prompt {self.prompt.id!r}"
        if not self.token_ids:
            raise ValueError(f"{where} has no tokens")
        if len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{where} has {len(self.token_ids)} tokens but {len(self.logprobs)} log-probs")
        assert self.top_ids is None or len(self.top_ids) == len(self.token_ids), "top_ids wants [L, K]"
        for position, (logprob, by_student) in enumerate(zip(self.logprobs, self.student_tokens(), strict=True)):
            if by_student and (logprob is None or not math.isfinite(logprob)):
                raise ValueError(f"{where}: token {position} was sampled by the student, but its log-prob is {logprob}")
        covered = [t for span in self.weight_versions for t in range(span.start, span.end)]
        if covered != [t for t, by_student in enumerate(self.student_tokens()) if by_student]:
            raise ValueError(f"{where}: weight versions must cover the student's tokens once, in order")

    def authors(self) -> tuple[Author, ...]:
        """Who wrote each token."""
        found: list[Author] = ["student"] * len(self.token_ids)
        for segment in self.segments:
            found[segment.start : segment.end] = [segment.author] * (segment.end - segment.start)
        return tuple(found)

    def student_tokens(self) -> tuple[bool, ...]:
        """Per token, whether the student sampled it."""
        return tuple(author == "student" for author in self.authors())

    @property
    def oldest_version(self) -> int | None:
        """The oldest weights that sampled a token; None where the student sampled none."""
        return min((span.version for span in self.weight_versions), default=None)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after a prompt, whoever it is."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of these tokens, at the temperature that drew them."""
    finish_reason: FinishReason
    top_ids: Tensor | None = field(default=None, compare=False)
    """As `Rollout.top_ids`."""


def written(prompt: Prompt, token_ids: Sequence[int], author: Author, finish_reason: FinishReason) -> Rollout:
    """A completion of `prompt` that the student did not sample: all of it by `author`."""
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
    """How much a teacher is to say of each completion token."""

    tier: Literal["sampled", "top_k", "given", "hidden"] = "sampled"
    """sampled: the log-prob of the token that stands there; top_k: also its k likeliest tokens; given: also those that
    the question names; hidden: also its last hidden state, from which its output layer gives the whole distribution."""
    k: int = 0
    """Of top_k."""


@dataclass(frozen=True, kw_only=True)
class TeacherScores:
    """What a teacher thinks of the completion tokens of one rollout; L of them."""

    logprobs: tuple[float, ...]
    """log π_T(token t | the teacher's prompt, the tokens before t), one per completion token."""
    top_ids: Tensor | None = (
        None  # [L, K] int64: the teacher's likeliest first, or the given ones; −1: it has none such
    )
    top_logprobs: Tensor | None = None  # [L, K] fp32
    hidden: Tensor | None = None  # [L, H]: row t is what the teacher predicts token t from
    teacher: int = 0
    """Which of several teachers."""

    def __post_init__(self) -> None:
        for position, logprob in enumerate(self.logprobs):
            if not math.isfinite(logprob):
                raise ValueError(f"the teacher's log-prob of completion token {position} is {logprob}")
        for name in ("top_ids", "top_logprobs", "hidden"):
            value = getattr(self, name)
            assert value is None or (value.dim() == 2 and len(value) == len(self.logprobs)), f"{name} wants [L, …]"


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout with its reward, its teacher's scores and its advantage."""

    rollout: Rollout
    reward: float | None
    """None: it could not be computed (then `error` says why, and the sample is masked; it is never a 0), or the
    algorithm asks for none."""
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)
    advantage: float = 0.0
    scores: Mapping[str, TeacherScores] = field(default_factory=dict)
    """By who scored the completion: `teacher`, and `reference`, the student's frozen start, where a loss has a KL to
    it. A name is absent where that one was not asked."""
    masks: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """By name, per completion token, whether it is under that mask; the algorithm's terms name them (`Term`)."""
    error: str | None = None
    """Why the reward could not be computed."""
    feedback: str | None = None
    """What the rewards said of the completion, in words."""

    def __post_init__(self) -> None:
        length = len(self.rollout.token_ids)
        for name, scores in self.scores.items():
            if len(scores.logprobs) != length:
                raise ValueError(f"the {name} scored {len(scores.logprobs)} tokens of a completion of {length}")
        for name, mask in self.masks.items():
            if len(mask) != length:
                raise ValueError(f"the mask {name} has {len(mask)} entries for a completion of {length}")

    @property
    def teacher(self) -> TeacherScores | None:
        """The teacher's scores; None where it was not asked."""
        return self.scores.get("teacher")

    def with_scores(self, name: str, scores: TeacherScores) -> ScoredRollout:
        """The rollout with what one more model thinks of it."""
        return dataclasses.replace(self, scores={**self.scores, name: scores})

    def with_mask(self, name: str, mask: tuple[bool, ...]) -> ScoredRollout:
        """The rollout with one more mask."""
        return dataclasses.replace(self, masks={**self.masks, name: mask})

    def is_correct(self, correct_at: float) -> bool | None:
        """Whether the reward reaches `correct_at`, up to the rounding of a weighted sum; None without a reward."""
        return None if self.reward is None else self.reward >= correct_at - 1e-6


@dataclass(frozen=True, kw_only=True)
class BatchScores:
    """What one model thinks of the completions of a batch; meaningful where it was asked."""

    logprobs: Tensor  # [B, T], at the temperature of whoever scored
    top_ids: Tensor | None = None  # [B, T, K] int64
    top_logprobs: Tensor | None = None  # [B, T, K]
    hidden: Tensor | None = None  # [B, T, H]: column t is what token t is predicted from
    index: Tensor | None = None  # [B] int64: which of `layers` belongs to the row
    layers: tuple[OutputLayer, ...] = ()
    """The output layers for `hidden`. They do not change while the batch lives."""

    def check(self, name: str, shape: torch.Size) -> None:
        """Raises: AssertionError where a shape is not that of a batch [B, T]."""
        assert self.logprobs.shape == shape, f"{name}.logprobs: expected {tuple(shape)}, got {self.logprobs.shape}"
        assert self.index is None or self.index.shape == shape[:1], f"{name}.index: expected [B]"
        for part in ("top_ids", "top_logprobs", "hidden"):
            value = getattr(self, part)
            assert value is None or value.shape[:2] == shape, f"{name}.{part}: expected [B, T, …], got {value.shape}"

    def to(self, device: torch.device | str, **kwargs: Any) -> BatchScores:
        """On `device`, all but the vectors of every token: a device need not hold an iteration's hidden states."""
        return dataclasses.replace(
            self,
            logprobs=self.logprobs.to(device, **kwargs),
            index=None if self.index is None else self.index.to(device, **kwargs),
            layers=tuple(layer.to(device) for layer in self.layers),
        )

    def rows(self, index: Tensor, length: int) -> BatchScores:
        """The rows `index` [b], cut to `length`."""
        picked: dict[str, Any] = {"index": None if self.index is None else self.index[index.to(self.index.device)]}
        for part in ("logprobs", "top_ids", "top_logprobs", "hidden"):
            value = getattr(self, part)
            picked[part] = None if value is None else value[index.to(value.device), :length]
        return dataclasses.replace(self, **picked)


_OF_ROWS = ("lengths", "rewards", "weight_version")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """All that the trainer sees of one rank's rollouts. Rows are right-padded to a common T."""

    iteration: int
    """Iterations completed before this one; schedules are functions of it."""
    input_ids: Tensor  # [B, T] int64: prompt, completion, padding
    lengths: Tensor  # [B] int64: prompt + completion tokens
    completion_mask: Tensor  # [B, T] bool: completion tokens of samples that count
    student_mask: Tensor  # [B, T] bool: of these, the tokens that the student sampled
    authors: Tensor  # [B, T] int64: index in AUTHORS of who wrote the token; meaningful on completion_mask only
    sampler_logprobs: Tensor  # [B, T] fp32, at the rollout temperature; meaningful on student_mask only
    advantages: Tensor  # [B, T] fp32
    rewards: Tensor  # [B] fp32, NaN where there is none
    weight_version: Tensor  # [B] int64: the oldest version that sampled a token of the row, −1 where none did
    old_logprobs: Tensor | None = None  # [B, T] the trainer's own, at the start of the iteration
    scores: Mapping[str, BatchScores] = field(default_factory=dict)
    """By who scored: `teacher`, `reference` (at the rollout temperature), or a name that the algorithm gives."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # each [B, T] bool
    """The masks that the algorithm's terms name beside `completion` and `student`."""
    loss_weights: Mapping[str, Tensor] = field(default_factory=dict)  # each [B, T]
    """By term: the weight of each token in it, made once an update from global counts (`Term`)."""
    metrics: Meter = field(default_factory=Meter)
    """What is known of this rank's rollouts before training."""

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        assert len(shape) == 2, f"input_ids: expected [B, T], got {tuple(shape)}"
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                expected = shape[:1] if f.name in _OF_ROWS else shape
                assert value.shape == expected, f"{f.name}: expected {tuple(expected)}, got {tuple(value.shape)}"
        for name, scores in self.scores.items():
            scores.check(name, shape)
        columns = torch.arange(shape[1], device=self.input_ids.device)
        real = columns < self.lengths[:, None]
        assert not bool((self.completion_mask & ~real).any()), "completion_mask covers padding"
        assert not bool(self.completion_mask[:, 0].any()), "column 0 has no past and cannot be trained"
        assert not bool((self.student_mask & ~self.completion_mask).any()), "student_mask exceeds completion_mask"
        for name, mask in self.masks.items():
            assert mask.shape == shape, f"the mask {name}: expected {tuple(shape)}, got {tuple(mask.shape)}"
            assert not bool((mask & ~self.completion_mask).any()), f"the mask {name} exceeds completion_mask"
        for name, weights in self.loss_weights.items():
            assert weights.shape == shape, f"the weights of {name}: expected {tuple(shape)}, got {tuple(weights.shape)}"

    def mask(self, name: str) -> Tensor:
        """[B, T] bool: `completion`, `student`, or one of `masks`."""
        return {"completion": self.completion_mask, "student": self.student_mask, **self.masks}[name]

    def weighted(self, **weights: Tensor) -> Batch:
        """The batch with other weights [B, T] for these terms."""
        return dataclasses.replace(self, loss_weights={**self.loss_weights, **weights})

    def to(self, device: torch.device | str, **kwargs: Any) -> Batch:
        """The same batch on `device` (Lightning asks for this of a custom batch)."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, **kwargs)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        for name in ("scores", "masks", "loss_weights"):
            moved[name] = {key: value.to(device, **kwargs) for key, value in getattr(self, name).items()}
        return dataclasses.replace(self, **moved)

    def rows(self, index: Tensor) -> Batch:
        """The rows `index` [b], cut to their longest length. Metrics stay with the whole batch."""
        length = int(self.lengths[index].max())
        picked: dict[str, Any] = {"metrics": Meter()}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                where = index.to(value.device)
                picked[f.name] = value[where] if f.name in _OF_ROWS else value[where, :length]
        for name in ("masks", "loss_weights"):
            found = getattr(self, name)
            picked[name] = {key: value[index.to(value.device), :length] for key, value in found.items()}
        picked["scores"] = {key: value.rows(index, length) for key, value in self.scores.items()}
        return dataclasses.replace(self, **picked)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])
