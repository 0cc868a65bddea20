"""The protocol that every sampler keeps, whether it runs in this process or behind HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import GenerationConfig

from rlkd.tiny import resolve
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
        """Take over `weights` (full, unsharded, Hugging Face names, the same on every rank) as version `version`.

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


def end_ids(path: str) -> tuple[int, ...]:
    """The token ids that end a completion, from the generation config of the model at `path`.

    Raises: ValueError when it names none: completions would never stop.
    """
    generation = GenerationConfig.from_pretrained(resolve(path))
    ids = generation.eos_token_id
    if ids is None:
        raise ValueError(f"{path} has no eos_token_id in its generation_config.json; add one")
    return tuple(ids) if isinstance(ids, list) else (int(ids),)
