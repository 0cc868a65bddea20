"""Scored rollouts → the tensors of a Batch, and the metrics that describe them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from rlkd.losses.lm_head import OutputLayer
from rlkd.metrics import MetricAccumulator
from rlkd.types import AUTHORS, Batch, BatchScores, ScoredRollout


def collate(
    groups: Sequence[Sequence[ScoredRollout]],
    iteration: int,
    layers: Mapping[str, tuple[OutputLayer, ...]] = MappingProxyType({}),
    *,
    scorers: Sequence[str] = (),
    masks: Sequence[str] = (),
    mask_failed: bool = True,
    probe: Batch | None = None,
    metrics: MetricAccumulator | None = None,
) -> Batch:
    """One row per rollout, padded on the right. With `mask_failed`, rows whose reward failed are masked completely.

    Masks come from lengths and authors, never from token ids (the padding token may equal the end token). Tokens
    that an environment wrote are context: no mask covers them. Sampler log-probs are NaN where the student did not
    sample, so that any use outside the mask becomes visible.

    Args:
        layers: scorer name → its output layers, if its scores have hidden states.
        scorers, masks: the names that the batch has even if no rollout of this rank has them.
        probe: see `Batch.probe`.
        metrics: the metrics of the rollouts; None: none.
    """
    rows = [scored for group in groups for scored in group]
    longest = max(len(s.rollout.prompt.token_ids) + len(s.rollout.token_ids) for s in rows)
    shape = (len(rows), longest)
    # Filled by NumPy, whose conversion of a short list costs a fraction of torch's.
    input_ids = np.zeros(shape, dtype=np.int64)
    completion_mask = np.zeros(shape, dtype=np.bool_)
    student_mask = np.zeros(shape, dtype=np.bool_)
    authors = np.zeros(shape, dtype=np.int64)
    sampler_logprobs = np.full(shape, math.nan, dtype=np.float32)
    advantages = np.zeros(shape, dtype=np.float32)
    marked = {name: np.zeros(shape, dtype=np.bool_) for name in sorted({*masks, *_names(rows, "masks")})}
    lengths, prompts = [], dict[tuple[int, ...], int]()
    for i, scored in enumerate(rows):
        rollout = scored.rollout
        start = len(rollout.prompt.token_ids)
        end = start + len(rollout.token_ids)
        lengths.append(end)
        counted = scored.error is None or not mask_failed
        written_by = np.array([AUTHORS.index(author) for author in rollout.authors()])
        trained = (written_by != AUTHORS.index("environment")) & counted
        input_ids[i, :end] = rollout.prompt.token_ids + rollout.token_ids
        completion_mask[i, start:end] = trained
        student_mask[i, start:end] = (written_by == AUTHORS.index("student")) & counted
        authors[i, start:end] = written_by
        sampler_logprobs[i, start:end] = [math.nan if p is None else p for p in rollout.logprobs]
        advantages[i, start:end] = scored.advantage
        for name, mask in marked.items():
            mask[i, start:end] = scored.masks.get(name, False) & trained
    scored_by = sorted({*scorers, *_names(rows, "scores")})
    return Batch(
        iteration=iteration,
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.tensor(lengths),
        prompt_lengths=torch.tensor([len(scored.rollout.prompt.token_ids) for scored in rows]),
        group=torch.tensor([prompts.setdefault(scored.rollout.prompt.token_ids, len(prompts)) for scored in rows]),
        completion_mask=torch.from_numpy(completion_mask),
        student_mask=torch.from_numpy(student_mask),
        authors=torch.from_numpy(authors),
        sampler_logprobs=torch.from_numpy(sampler_logprobs),
        advantages=torch.from_numpy(advantages),
        rewards=torch.tensor([math.nan if s.reward is None else s.reward for s in rows]),
        weight_version=torch.tensor([-1 if v is None else v for v in (s.rollout.oldest_version for s in rows)]),
        masks={name: torch.from_numpy(mask) for name, mask in marked.items()},
        scores={name: _scores(rows, name, shape, layers.get(name, ())) for name in scored_by},
        probe=probe,
        metrics=MetricAccumulator() if metrics is None else metrics,
    ).checked()


def _names(rows: Sequence[ScoredRollout], which: str) -> list[str]:
    """The keys that the dictionary `which` has in any row, sorted."""
    return sorted({name for row in rows for name in getattr(row, which)})


def _scores(
    rows: Sequence[ScoredRollout], name: str, shape: tuple[int, int], layers: tuple[OutputLayer, ...]
) -> BatchScores:
    """One scorer's scores of the rows; zeros where it was not asked."""
    given = [row.scores[name] for row in rows if name in row.scores]
    logprobs = np.zeros(shape, dtype=np.float32)
    # Scores of different widths share one tensor. Unused entries of narrower ones hold no token, rather than token 0.
    vectors = {
        "top_ids": _filled(shape, [scores.top_ids for scores in given], -1),
        "top_logprobs": _filled(shape, [scores.top_logprobs for scores in given], -math.inf),
        "hidden": _filled(shape, [scores.hidden for scores in given], 0),
    }
    for i, row in enumerate(rows):
        if name not in row.scores:
            continue
        start = len(row.rollout.prompt.token_ids)
        end = start + len(row.rollout.token_ids)
        logprobs[i, start:end] = row.scores[name].logprobs
        for part, full in vectors.items():
            value = getattr(row.scores[name], part)
            if full is not None and value is not None:
                full[i, start:end, : value.shape[1]] = value
    index = torch.tensor([row.scores[name].teacher if name in row.scores else 0 for row in rows])
    return BatchScores(logprobs=torch.from_numpy(logprobs), index=index, layers=layers, **vectors)


def _filled(shape: tuple[int, int], parts: Sequence[torch.Tensor | None], value: float) -> torch.Tensor | None:
    """[B, T, width of the widest of `parts`], in a dtype that holds them all; None if every part is None."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in given))
    return torch.full((*shape, max(part.shape[1] for part in given)), value, dtype=dtype)


def describe(groups: Sequence[Sequence[ScoredRollout]], iteration: int, correct_at: float) -> MetricAccumulator:
    """The metrics of this rank's rollouts: rewards, lengths, groups, staleness."""
    meter = MetricAccumulator()
    for group in groups:
        rewards = [s.reward for s in group if s.reward is not None]
        correct = [s.is_correct(correct_at) is True for s in group if s.reward is not None]
        meter.mean("reward/mean", math.fsum(rewards), len(rewards))
        meter.mean("accuracy", sum(correct), len(correct))
        mean = math.fsum(rewards) / max(len(rewards), 1)
        variance = math.fsum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
        known = float(bool(rewards))  # an offline stage has no rewards
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
