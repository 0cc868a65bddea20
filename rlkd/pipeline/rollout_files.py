"""The rollouts of a run as JSONL, in its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.data.chat import decode, token_ends
from rlkd.storage import atomic
from rlkd.types import ScoredRollout


def write_rollouts(
    config: Config, tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[ScoredRollout]], iteration: int
) -> None:
    """Write all rollouts of this rank, if `log.rollouts_every` selects this iteration."""
    every = config.log.rollouts_every
    if not every or iteration % every:
        return
    folder = Path(config.run_dir, "rollouts")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    alone: dict[int, str] = {}
    for scored in (s for group in groups for s in group):
        rollout = scored.rollout
        completion = decode(tokenizer, rollout.token_ids)
        line = {
            "iteration": iteration + 1,
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
    name = f"{iteration + 1:06d}-rank{distributed.rank()}.jsonl"
    atomic.write(folder / name, "".join(lines).encode())


def _short(logprobs: Sequence[float | None]) -> list[float | None]:
    """With four significant digits, which halves the file."""
    return [None if logprob is None else float(f"{logprob:.4g}") for logprob in logprobs]
