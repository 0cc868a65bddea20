"""The protocol that every sampler keeps, whether it runs in this process or behind HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from rlkd.builtin import resolve
from rlkd.data.chat import load_tokenizer
from rlkd.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw completions."""

    temperature: float
    """0 is greedy: the log-probs are then those of temperature 1."""
    max_tokens: int
    seed: int
    top_k: int = 0
    """How many of its likeliest tokens a sampler names at each position; fewer where the vocabulary has fewer."""


class Sampler(Protocol):
    """Generates with the weights that it was last given, and says which those were.

    Life: `start` and `open` once, then `publish` (a collective: every rank calls it) and `sample` (each rank for its
    own prompts), then `close`. Where nothing is trained, `keep_loaded` stands in place of every `publish`.
    """

    def start(self) -> None:
        """Begin what takes long, such as starting servers, without waiting. Every rank calls it, before `open`."""
        ...

    def open(self) -> None:
        """Load the model or connect to the servers. Every rank calls it, after the process group exists."""
        ...

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take over `weights` (full, unsharded, the same on every rank) as version `version`.

        Their names: those in memory for a sampler in this process, those of a checkpoint's files for a server.

        Raises: RunStopped when a server refuses them. One that does not answer is left out until it is back.
        """
        ...

    def keep_loaded(self) -> None:
        """In place of a first `publish`, after `open`: the weights that it has loaded, or found, are version 0.

        Raises: RunStopped when a server holds others than it was started with.
        """
        ...

    def recover(self) -> None:
        """Where `sample` raised ServerLost on any rank: wait for the servers and give them the published weights again.

        A collective. Raises: RunStopped on every rank when they do not come back.
        """
        ...

    def sample(self, prompts: Sequence[Prompt], *, n: int, iteration: int, sampling: Sampling) -> list[list[Rollout]]:
        """n completions of each prompt, by the published weights; one list per prompt, in order.

        What is drawn is a function of (sampling.seed, iteration, prompt.id, sample index), not of the company in
        the batch. Every rollout carries the version that it was sampled with.
        """
        ...

    def close(self) -> None:
        """Free what `open` took."""
        ...


def end_ids(path: str, trust_remote_code: bool) -> tuple[int, ...]:
    """The token ids that end a completion: `eos_token_id` of the model's generation_config.json, which may be missing,
    else of its config.json, else of its tokenizer.

    Raises: ValueError, one line, when none has one, or it names no token of the vocabulary: completions would never
        stop.
    """
    folder = resolve(path)
    config, _ = PreTrainedConfig.get_config_dict(folder)
    text = config.get("text_config") or {}
    file = cached_file(folder, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    generation = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    found = [(GENERATION_CONFIG_NAME, generation), (CONFIG_NAME, config), (CONFIG_NAME, text)]
    where, value = next(
        ((name, keys["eos_token_id"]) for name, keys in found if keys.get("eos_token_id") is not None), (None, None)
    )
    if where is None:
        where, value = "its tokenizer", load_tokenizer(path, trust_remote_code).eos_token_id
    ids = value if isinstance(value, list) else [value]
    vocabulary = config.get("vocab_size") or text.get("vocab_size")
    if not ids or not all(type(i) is int and 0 <= i < (vocabulary or i + 1) for i in ids):
        raise ValueError(
            f"{path}: eos_token_id of {where} is {value}, wants the tokens that end a completion, else none ever stops"
            f"{f' (ids below {vocabulary})' if vocabulary else ''}; give them in {GENERATION_CONFIG_NAME}"
        )
    return tuple(ids)
