"""Scored rollouts → the tensors of a Batch, and the figures that describe them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from rlkd.losses.lm_head import OutputLayer
from rlkd.metrics import Meter
from rlkd.types import AUTHORS, Batch, ScoredRollout


def collate(
    groups: Sequence[Sequence[ScoredRollout]],
    iteration: int,
    layers: tuple[OutputLayer, ...] = (),
    *,
    mask_failed: bool = True,
) -> Batch:
    """One row a rollout, padded on the right. With `mask_failed`, rows whose reward failed are masked whole.

    Masks come from lengths, never from token ids (padding may equal end-of-sequence). Sampler log-probs are NaN
    where the student did not sample, so that a use outside the mask shows. `layers`: the teachers' output layers,
    where they gave hidden states.
    """
    rows = [scored for group in groups for scored in group]
    longest = max(len(s.rollout.prompt.token_ids) + len(s.rollout.token_ids) for s in rows)
    shape = (len(rows), longest)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    student_mask = torch.zeros(shape, dtype=torch.bool)
    authors = torch.zeros(shape, dtype=torch.int64)
    sampler_logprobs = torch.full(shape, math.nan)
    advantages = torch.zeros(shape)
    teacher = torch.zeros(shape) if any(s.teacher is not None for s in rows) else None
    # Teachers of several widths share one tensor. What a narrower one leaves free is no token, not token 0.
    top_ids = _filled(shape, [s.teacher.top_ids for s in rows if s.teacher is not None], -1)
    top_logprobs = _filled(shape, [s.teacher.top_logprobs for s in rows if s.teacher is not None], -math.inf)
    hidden = _filled(shape, [s.teacher.hidden for s in rows if s.teacher is not None], 0)
    reference = torch.zeros(shape) if all(s.reference is not None for s in rows) else None
    distil = torch.zeros(shape, dtype=torch.bool) if all(s.distil is not None for s in rows) else None
    lengths = []
    for i, scored in enumerate(rows):
        rollout = scored.rollout
        start = len(rollout.prompt.token_ids)
        end = start + len(rollout.token_ids)
        lengths.append(end)
        counted = scored.error is None or not mask_failed
        by_student = torch.tensor(rollout.student_tokens())
        input_ids[i, :end] = torch.tensor(rollout.prompt.token_ids + rollout.token_ids)
        completion_mask[i, start:end] = counted
        student_mask[i, start:end] = by_student & counted
        authors[i, start:end] = torch.tensor([AUTHORS.index(author) for author in rollout.authors()])
        sampler_logprobs[i, start:end] = torch.tensor([math.nan if p is None else p for p in rollout.logprobs])
        advantages[i, start:end] = scored.advantage
        if teacher is not None and scored.teacher is not None:
            teacher[i, start:end] = torch.tensor(scored.teacher.logprobs)
            for whole, part in (
                (top_ids, scored.teacher.top_ids),
                (top_logprobs, scored.teacher.top_logprobs),
                (hidden, scored.teacher.hidden),
            ):
                if whole is not None and part is not None:
                    whole[i, start:end, : part.shape[1]] = part
        if reference is not None and scored.reference is not None:
            reference[i, start:end] = torch.tensor(scored.reference.logprobs)
        if distil is not None and scored.distil is not None:
            distil[i, start:end] = torch.tensor(scored.distil) & counted
    return Batch(
        iteration=iteration,
        input_ids=input_ids,
        lengths=torch.tensor(lengths),
        completion_mask=completion_mask,
        student_mask=student_mask,
        authors=authors,
        sampler_logprobs=sampler_logprobs,
        advantages=advantages,
        rewards=torch.tensor([math.nan if s.reward is None else s.reward for s in rows]),
        weight_version=torch.tensor([-1 if v is None else v for v in (s.rollout.oldest_version for s in rows)]),
        teacher_logprobs=teacher,
        teacher_top_ids=top_ids,
        teacher_top_logprobs=top_logprobs,
        teacher_hidden=hidden,
        teacher_index=torch.tensor([0 if s.teacher is None else s.teacher.teacher for s in rows]),
        teacher_layers=layers,
        reference_logprobs=reference,
        distil_mask=distil,
    )


def _filled(shape: tuple[int, int], parts: Sequence[torch.Tensor | None], value: float) -> torch.Tensor | None:
    """[B, T, width of the widest of `parts`], in a type that holds them all; None where no row has such a part."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in given))
    return torch.full((*shape, max(part.shape[1] for part in given)), value, dtype=dtype)


def describe(groups: Sequence[Sequence[ScoredRollout]], iteration: int, correct_at: float) -> Meter:
    """The figures of this rank's rollouts: rewards, lengths, groups, staleness."""
    meter = Meter()
    for group in groups:
        rewards = [s.reward for s in group if s.reward is not None]
        correct = [s.is_correct(correct_at) is True for s in group if s.reward is not None]
        meter.mean("reward/mean", math.fsum(rewards), len(rewards))
        meter.mean("accuracy", sum(correct), len(correct))
        mean = math.fsum(rewards) / max(len(rewards), 1)
        variance = math.fsum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
        known = float(bool(rewards))  # an offline stage has none
        meter.mean("reward/std", math.sqrt(variance) * known, known)
        meter.total("reward/errors", float(sum(s.error is not None for s in group)))
        meter.mean("groups/all_correct", float(bool(correct) and all(correct)), known)
        meter.mean("groups/all_wrong", float(bool(correct) and not any(correct)), known)
        for s in group:
            meter.mean("completion/length", len(s.rollout.token_ids), 1.0)
            meter.mean("completion/truncated", float(s.rollout.finish_reason == "length"), 1.0)
            version = s.rollout.oldest_version
            meter.mean("staleness/mean", 0.0 if version is None else iteration - version, float(version is not None))
            meter.total("tokens/generated", float(sum(s.rollout.student_tokens())))
    return meter
