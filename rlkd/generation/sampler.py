"""The protocol that every sampler implements, whether it runs in this process or on servers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from rlkd.builtin import resolve
from rlkd.data.chat import load_tokenizer
from rlkd.models.weights import Published
from rlkd.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw completions."""

    temperature: float
    """0 is greedy; the log-probs are then those of temperature 1."""
    max_tokens: int
    seed: int
    top_k: int = 0
    """How many of the most likely tokens to return at each position, at most the size of the vocabulary."""


class Sampler(Protocol):
    """Generates with the last published weights and reports their version.

    Call `start` and `open` once, then `publish` (a collective: every rank calls it) and `sample` (each rank for its
    own prompts), then `close`. If nothing is trained, call `keep_loaded` instead of `publish`.
    """

    @property
    def in_process(self) -> bool:
        """Whether the model is in this process, rather than on servers."""
        ...

    def start(self) -> None:
        """Begin slow operations, such as starting servers, without waiting. Every rank calls it before `open`."""
        ...

    def open(self) -> None:
        """Load the model or connect to the servers. Every rank calls it after the process group exists."""
        ...

    def publish(self, student: Published, version: int) -> None:
        """Use the student's weights as version `version`. A collective.

        Raises: RunStopped if a server rejects the weights. A server that does not answer is not used until it is back.
        """
        ...

    def sleep(self) -> None:
        """With `rollout.server.sleep`, give the servers' memory back until the next `publish`.

        A collective, when no rank samples any more. Raises: RunStopped on every rank if a server refuses.
        """
        ...

    def keep_loaded(self) -> None:
        """Use the weights that `open` loaded, or that the servers were started with, as version 0.

        Raises: RunStopped if a server no longer holds the weights that it was started with.
        """
        ...

    def recover(self) -> None:
        """After `sample` raised ServerLost on any rank: wait for the servers and send them the published weights again.

        A collective. Raises: RunStopped on every rank if the servers do not come back.
        """
        ...

    def sample(self, prompts: Sequence[Prompt], *, n: int, iteration: int, sampling: Sampling) -> list[list[Rollout]]:
        """n completions of each prompt by the published weights; one list per prompt, in order.

        The samples are a function of (sampling.seed, iteration, prompt.id, sample index) and do not depend on what else
        is in the batch. Every rollout has the weight version that sampled it.
        """
        ...

    def close(self) -> None:
        """Release the model, or the servers and connections."""
        ...


class AsyncSampler(Protocol):
    """A sampler as an algorithm sees it: the completions of one prompt, while other prompts are under way."""

    async def sample(self, prompt: Prompt, *, n: int, iteration: int, sampling: Sampling) -> list[Rollout]:
        """n completions of `prompt` by the published weights; see `Sampler.sample`."""
        ...


def eos_ids(path: str, trust_remote_code: bool) -> tuple[int, ...]:
    """The token ids that end a completion: `eos_token_id` of the model's generation_config.json if it has one, else of
    its config.json, else of its tokenizer.

    Raises: ValueError, one line, if there is none or an id is outside the vocabulary, since completions would never
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
        where, value = "the tokenizer", load_tokenizer(path, trust_remote_code).eos_token_id
    ids = value if isinstance(value, list) else [value]
    vocabulary = config.get("vocab_size") or text.get("vocab_size")
    if not ids or not all(type(i) is int and 0 <= i < (vocabulary or i + 1) for i in ids):
        raise ValueError(
            f"{path}: expected eos_token_id of {where} to be the ids of the tokens that end a completion"
            f"{f' (below {vocabulary})' if vocabulary else ''}, got {value}; set it in {GENERATION_CONFIG_NAME}, "
            "or completions never stop"
        )
    return tuple(ids)
