"""Scored rollouts → the tensors of a Batch, and the figures that describe them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlkd.metrics import Meter
from rlkd.types import Batch, ScoredRollout


def collate(groups: Sequence[Sequence[ScoredRollout]], iteration: int) -> Batch:
    """One row a rollout, padded on the right. Rows whose reward failed are masked whole.

    Masks come from lengths, never from token ids (padding may equal end-of-sequence). Sampler log-probs are NaN
    where the student did not sample, so that a use outside the mask shows.
    """
    rows = [scored for group in groups for scored in group]
    longest = max(len(s.rollout.prompt.token_ids) + len(s.rollout.token_ids) for s in rows)
    shape = (len(rows), longest)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    student_mask = torch.zeros(shape, dtype=torch.bool)
    sampler_logprobs = torch.full(shape, math.nan)
    advantages = torch.zeros(shape)
    teacher = torch.zeros(shape) if all(s.teacher is not None for s in rows) else None
    reference = torch.zeros(shape) if all(s.reference is not None for s in rows) else None
    distil = torch.zeros(shape, dtype=torch.bool) if all(s.distil is not None for s in rows) else None
    lengths = []
    for i, scored in enumerate(rows):
        rollout = scored.rollout
        start = len(rollout.prompt.token_ids)
        end = start + len(rollout.token_ids)
        lengths.append(end)
        counted = scored.reward is not None
        by_student = torch.tensor(rollout.student_tokens())
        input_ids[i, :end] = torch.tensor(rollout.prompt.token_ids + rollout.token_ids)
        completion_mask[i, start:end] = counted
        student_mask[i, start:end] = by_student & counted
        sampler_logprobs[i, start:end] = torch.tensor([math.nan if p is None else p for p in rollout.logprobs])
        advantages[i, start:end] = scored.advantage
        if teacher is not None and scored.teacher is not None:
            teacher[i, start:end] = torch.tensor(scored.teacher.logprobs)
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
        sampler_logprobs=sampler_logprobs,
        advantages=advantages,
        rewards=torch.tensor([math.nan if s.reward is None else s.reward for s in rows]),
        weight_version=torch.tensor([s.rollout.oldest_version for s in rows]),
        teacher_logprobs=teacher,
        reference_logprobs=reference,
        distil_mask=distil,
    )


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
        meter.mean("reward/std", math.sqrt(variance), 1.0)
        meter.total("reward/errors", float(len(group) - len(rewards)))
        meter.mean("groups/all_correct", float(bool(correct) and all(correct)), 1.0)
        meter.mean("groups/all_wrong", float(bool(correct) and not any(correct)), 1.0)
        for s in group:
            meter.mean("completion/length", len(s.rollout.token_ids), 1.0)
            meter.mean("completion/truncated", float(s.rollout.finish_reason == "length"), 1.0)
            meter.mean("staleness/mean", iteration - s.rollout.oldest_version, 1.0)
            meter.total("tokens/generated", float(sum(s.rollout.student_tokens())))
    return meter
