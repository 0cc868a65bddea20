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
from rlkd.metrics import MetricAccumulator

FinishReason = Literal["stop", "length"]
"""`stop`: the last token is the end-of-sequence token that the author chose. `length`: the token limit was reached."""

Author = Literal["student", "teacher", "glue", "data", "environment"]
"""Where a token comes from: the student sampled it, a teacher wrote it, it joins two parts, it is from the data, or an
environment answered with it. The last is context: no term of a loss acts on it."""
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
    note: str = ""
    """What the algorithm noted when it made the rollout, for its metrics (`Algorithm.diagnose`)."""
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
    scores: Mapping[str, TeacherScores] = field(default_factory=dict)
    """By scorer: `teacher`, and `reference`, the frozen initial student, if the loss has a KL term to it. A scorer that
    was not asked has no entry."""
    masks: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """By name: whether each completion token is under that mask. An algorithm's terms use these names (`Term`)."""
    error: str | None = None
    """Why the reward could not be computed."""
    feedback: str | None = None
    """Written feedback from the rewards."""

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
        """Whether the reward is at least `correct_at`, up to the rounding of a weighted sum; None without a reward."""
        return None if self.reward is None else self.reward >= correct_at - 1e-6


@dataclass(frozen=True, kw_only=True)
class BatchScores:
    """What one model thinks of the completions of a batch; meaningful where it was asked."""

    logprobs: Tensor  # [B, T], at the temperature of the scorer
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
        """A copy on `device`, except the top-k and hidden tensors, which may not fit there."""
        return dataclasses.replace(
            self,
            logprobs=self.logprobs.to(device, **kwargs),
            index=None if self.index is None else self.index.to(device, **kwargs),
            layers=tuple(layer.to(device) for layer in self.layers),
        )

    def brought(self, device: torch.device) -> BatchScores:
        """A copy with all tensors on `device`, for one micro-batch. To a GPU they are copied while it computes."""

        def bring(value: Tensor | None) -> Tensor | None:
            if value is None or value.device == device:
                return value
            return value.pin_memory().to(device, non_blocking=True)

        return dataclasses.replace(
            self,
            top_ids=bring(self.top_ids),
            top_logprobs=bring(self.top_logprobs),
            hidden=bring(self.hidden),
        )

    def rows(self, index: Tensor, length: int) -> BatchScores:
        """The rows `index` [b], cut to `length`."""
        picked: dict[str, Any] = {"index": None if self.index is None else self.index[index.to(self.index.device)]}
        for part in ("logprobs", "top_ids", "top_logprobs", "hidden"):
            value = getattr(self, part)
            picked[part] = None if value is None else value[index.to(value.device), :length]
        return dataclasses.replace(self, **picked)


_OF_ROWS = ("lengths", "prompt_lengths", "group", "rewards", "weight_version")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's rollouts as tensors; the trainer sees nothing else of them. Rows are right-padded to a common T."""

    iteration: int
    """The number of iterations completed before this one. Schedules are functions of it."""
    input_ids: Tensor  # [B, T] int64: prompt, completion, padding
    lengths: Tensor  # [B] int64: prompt + completion tokens
    prompt_lengths: Tensor  # [B] int64: prompt tokens
    group: Tensor  # [B] int64: rows with equal numbers have the same prompt
    completion_mask: Tensor  # [B, T] bool: completion tokens of samples that count
    student_mask: Tensor  # [B, T] bool: those completion tokens that the student sampled
    authors: Tensor  # [B, T] int64: the token's author as an index into AUTHORS; only valid on completion_mask
    sampler_logprobs: Tensor  # [B, T] fp32, at the rollout temperature; only valid on student_mask
    advantages: Tensor  # [B, T] fp32
    rewards: Tensor  # [B] fp32; NaN for rows without a reward
    weight_version: Tensor  # [B] int64: the oldest weight version that sampled a token of the row; −1 if none did
    old_logprobs: Tensor | None = None  # [B, T] by the trainer, at the start of the iteration
    scores: Mapping[str, BatchScores] = field(default_factory=dict)
    """By scorer: `teacher`, `reference` (at the rollout temperature), or a name that the algorithm gives."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # each [B, T] bool
    """The masks that the algorithm's terms use besides `completion` and `student`."""
    loss_weights: Mapping[str, Tensor] = field(default_factory=dict)  # each [B, T]
    """By term: the weight of each token in it, made once per update from global counts (`Term`)."""
    sequences: tuple[tuple[int, ...], ...] = ()
    """Of a micro-batch: the rows that are computed as one sequence, for each (`trainer.share_prompts`); empty: each row
    is one of its own."""
    probe: Batch | None = None
    """Completions by the newest weights, where those of the batch may be by older ones (`rollout.max_staleness`). They
    are not trained on: sampler and trainer are compared on them."""
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)
    """Metrics of this rank's rollouts that are known before training."""

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
        for what, tensors in (("mask", self.masks), ("weights of", self.loss_weights)):
            for name, value in tensors.items():
                assert value.shape == shape, f"the {what} {name}: expected {tuple(shape)}, got {tuple(value.shape)}"

    def checked(self) -> Batch:
        """The batch, after a look at its values, for which a GPU would have to be waited for: call it on the CPU.

        Raises: AssertionError if a mask covers what cannot be trained.
        """
        real = torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]
        assert not bool((self.completion_mask & ~real).any()), "completion_mask covers padding"
        assert not bool(self.completion_mask[:, 0].any()), "column 0 has no preceding tokens and cannot be trained"
        assert not bool((self.student_mask & ~self.completion_mask).any()), "student_mask exceeds completion_mask"
        for name, mask in self.masks.items():
            assert not bool((mask & ~self.completion_mask).any()), f"the mask {name} exceeds completion_mask"
        return self

    def mask(self, name: str) -> Tensor:
        """[B, T] bool: `completion`, `student`, or one of `masks`."""
        return {"completion": self.completion_mask, "student": self.student_mask, **self.masks}[name]

    def weighted(self, **weights: Tensor) -> Batch:
        """The batch with other weights [B, T] for these terms."""
        return dataclasses.replace(self, loss_weights={**self.loss_weights, **weights})

    def to(self, device: torch.device | str, **kwargs: Any) -> Batch:
        """The same batch on `device`. Lightning calls this on a custom batch."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, **kwargs)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        for name in ("scores", "masks", "loss_weights"):
            moved[name] = {key: value.to(device, **kwargs) for key, value in getattr(self, name).items()}
        moved["probe"] = None if self.probe is None else self.probe.to(device, **kwargs)
        return dataclasses.replace(self, **moved)

    def rows(self, index: Tensor, length: int | None = None) -> Batch:
        """The rows `index` [b], cut to the longest of them. The metrics and the probe stay with the full batch.

        Args:
            length: that of the longest, where the caller knows it; None: it is read from the device.
        """
        if length is None:
            length = int(self.lengths[index].max())
        picked: dict[str, Any] = {"metrics": MetricAccumulator(), "probe": None, "sequences": ()}
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
