"""Whether a vLLM server keeps padded rows of its vocabulary out of its softmax (vocabulary.py).

Servers that rlkd starts, or `rlkd.serve`, do (servers/plugin.py). What others do shows only in their answers.
"""

from __future__ import annotations

import math
import sys

from rlkd.servers.client import IMPOSSIBLE_LOGPROB, ServerError, VLLMClient
from rlkd.servers.plugin import VARIABLE
from rlkd.servers.responses import CompletionsAnswer, in_order

CONTEXTS = 4
"""How many different tokens the probe asks about what may follow."""
PADDED_IDS = 256
"""How many padded ids it asks for at most, evenly spread."""
TOLERATED = 1e-3
"""Nats by which padding may lower a teacher's log-probs."""


def check_padding(client: VLLMClient, model: str, padding: range, samples: bool) -> None:
    """Ask the server how likely padded ids are after a few tokens; nothing where there are none.

    Args:
        model: its name there.
        padding: the padded ids, the last ones of the model.
        samples: whether the server draws completions. Then padded ids must be impossible: one that is drawn would end
            the run. What only scores may give them a probability that hardly changes the others; that is said.

    Raises: ServerError, one line, when padded ids are too likely.
    """
    share = padding_share(client, model, padding) if padding else 0.0
    if share == 0:
        return
    difference = -math.log1p(-share) if share < 1 else math.inf
    what = f"{client.url}: the {len(padding)} padded rows of its vocabulary have a probability of {share:.2g}"
    if samples or difference > TOLERATED:
        raise ServerError(
            f"{what}, wanted 0, since they stand for no token; start the server by python -m rlkd.serve, or with "
            f"{VARIABLE}={padding.start} in its environment, where rlkd is installed"
        )
    print(f"{what}: its log-probs are too low by up to {difference:.2g} nats", file=sys.stderr, flush=True)


def padding_share(client: VLLMClient, model: str, padding: range) -> float:
    """The largest probability, over a few contexts of one token, of all padded ids together.

    With more than PADDED_IDS of them it is an estimate from as many.
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
        figure = (entries[1] or {}).get(token) if len(entries) == 2 else None
        if figure is None or figure.logprob is None:
            raise ServerError(f"{client.url}: no log-prob of token {token} after token {context}")
        if figure.logprob > IMPOSSIBLE_LOGPROB:
            shares[context] += step * math.exp(figure.logprob)
    return max(shares.values())
