"""Check that a vLLM server excludes padded rows of its vocabulary from its softmax (vocabulary.py).

Servers started by rlkd or `rlkd.serve` do (servers/plugin.py). Other servers have to be probed.
"""

from __future__ import annotations

import math
import sys

from rlkd.servers.client import IMPOSSIBLE_LOGPROB, ServerError, VLLMClient
from rlkd.servers.plugin import VARIABLE
from rlkd.servers.responses import CompletionsAnswer, in_order

CONTEXTS = 4
"""Number of one-token contexts that the probe uses."""
PADDED_IDS = 256
"""Largest number of padded ids that it asks for, evenly spread."""
TOLERATED = 1e-3
"""Nats by which padding may lower a teacher's log-probs."""


def check_padding(client: VLLMClient, model: str, padding: range, samples: bool) -> None:
    """Ask the server for the probability of padded ids after a few tokens. Does nothing without padding.

    Args:
        model: the model's name at the server.
        padding: the padded ids, the last ones of the model.
        samples: whether the server draws completions. Then padded ids must have probability 0: sampling one
            would end the run. A server that only scores may give them a negligible probability; this prints a warning.

    Raises: ServerError, one line, when padded ids are too likely.
    """
    share = padding_share(client, model, padding) if padding else 0.0
    if share == 0:
        return
    difference = -math.log1p(-share) if share < 1 else math.inf
    rows = f"the {len(padding)} padded rows of its vocabulary"
    if samples or difference > TOLERATED:
        raise ServerError(
            f"{client.url}: expected probability 0 for {rows}, got {share:.2g}; start the server by python -m "
            f"rlkd.serve, or with {VARIABLE}={padding.start} in its environment, where rlkd is installed"
        )
    print(
        f"{client.url}: {rows} have probability {share:.2g}: log-probs are too low by up to {difference:.2g} nats",
        file=sys.stderr,
        flush=True,
    )


def padding_share(client: VLLMClient, model: str, padding: range) -> float:
    """The largest probability, over a few contexts of one token, of all padded ids together.

    With more than PADDED_IDS padded ids this is an estimate from a sample of them.
    """
    step = math.ceil(len(padding) / PADDED_IDS)
    asked = padding[::step]
    contexts = sorted({padding.start * i // CONTEXTS for i in range(CONTEXTS)})
    prompts = [[context, token] for context in contexts for token in asked]
    answer = client.post(
        "/v1/completions",
        {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0},
        CompletionsAnswer,
    )
    try:
        places = in_order([choice.index for choice in answer.choices], len(prompts))
    except ValueError as error:
        raise ServerError(f"{client.url}: {error}") from error
    shares = dict.fromkeys(contexts, 0.0)
    for place, (context, token) in zip(places, prompts, strict=True):
        entries = answer.choices[place].prompt_logprobs or []
        entry = (entries[1] or {}).get(token) if len(entries) == 2 else None
        if entry is None or entry.logprob is None:
            raise ServerError(f"{client.url}: no log-prob of token {token} after token {context}")
        if entry.logprob > IMPOSSIBLE_LOGPROB:
            shares[context] += step * math.exp(entry.logprob)
    return max(shares.values())
