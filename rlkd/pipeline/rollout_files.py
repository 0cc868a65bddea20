"""The rollouts of a run as JSONL, in its directory, and what the trainer found of their tokens."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.data.chat import decode, token_ends
from rlkd.storage import atomic
from rlkd.types import Batch, ScoredRollout


def write_rollouts(
    config: Config, tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[ScoredRollout]], iteration: int
) -> None:
    """Write all rollouts of this rank, if `log.rollouts_every` selects this iteration."""
    if not _selected(config, iteration):
        return
    lines = []
    alone: dict[int, str] = {}
    for row, scored in enumerate(s for group in groups for s in group):
        rollout = scored.rollout
        completion = decode(tokenizer, rollout.token_ids)
        line = {
            "iteration": iteration + 1,
            "row": row,
            "id": rollout.prompt.id,
            "prompt": decode(tokenizer, rollout.prompt.token_ids),
            "completion": completion,
            "answer": rollout.prompt.answer,
            "reward": scored.reward,
            "reward_parts": dict(scored.reward_parts),
            "error": scored.error,
            "advantage": scored.advantage,
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.oldest_version,
            "segments": [[part.author, part.start, part.end] for part in rollout.segments],
            "token_ids": list(rollout.token_ids),
            "token_ends": token_ends(tokenizer, rollout.token_ids, completion, alone),
            "logprobs": _short(rollout.logprobs),
            "teacher_logprobs": None if scored.teacher is None else _short(scored.teacher.logprobs),
        }
        lines.append(json.dumps(line) + "\n")
    atomic.write(_path(config, "rollouts", iteration, "jsonl"), "".join(lines).encode())


def write_by_token(config: Config, batch: Batch, by_token: Mapping[str, Tensor]) -> None:
    """Write what the trainer found of this rank's completions, if `log.rollouts_every` selects this iteration.

    `tokens/*.npz` has these in half precision, the completions of all rows one after the other: `gaps`, the
    trainer's log-probs less the sampler's (NaN for tokens that the student did not sample), and `entropies`, if they
    are in `by_token` [B, T]; and `lengths`, those of the completions. Row i is the line of rollouts/*.jsonl whose `row`
    is i.
    """
    if not _selected(config, batch.iteration):
        return
    at = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    inside = (at >= batch.prompt_lengths[:, None]) & (at < batch.lengths[:, None])
    found = {"gaps": by_token["logprobs"] - batch.sampler_logprobs}
    if "entropies" in by_token:
        found["entropies"] = by_token["entropies"]
    arrays: dict[str, Any] = {name: value[inside].half().cpu().numpy() for name, value in found.items()}
    arrays["lengths"] = (batch.lengths - batch.prompt_lengths).cpu().numpy()
    content = io.BytesIO()
    np.savez(content, **arrays)
    atomic.write(_path(config, "tokens", batch.iteration, "npz"), content.getvalue())


def _selected(config: Config, iteration: int) -> bool:
    return config.log.rollouts_every > 0 and iteration % config.log.rollouts_every == 0


def _path(config: Config, folder: str, iteration: int, kind: str) -> Path:
    """The file of this rank, in a folder that exists."""
    path = Path(config.run_dir, folder, f"{iteration + 1:06d}-rank{distributed.rank()}.{kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _short(logprobs: Sequence[float | None]) -> list[float | None]:
    """With four significant digits, which halves the file."""
    return [None if logprob is None else float(f"{logprob:.4g}") for logprob in logprobs]
