"""The log-probs of given tokens, which a vLLM server returns as an array in base64, not as a JSON object a token.

vLLM 0.32 does so only with its V2 model runner, which GPUs have, and on a route that --enable-scale-out adds. A server
reports neither, so each server is asked once, with the shortest request of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlkd.servers.client import Refused, ServerError, VLLMClient, check_model
from rlkd.servers.responses import GivenAnswer, float_array


def given_logprobs(client: VLLMClient, model: str, token_ids: Sequence[int], rows: Tensor) -> Tensor:
    """[L, K] fp32: the log-prob of each of `rows` in place of one of the last L tokens of `token_ids`.

    Args:
        rows: [L, K] ids; −1: padding, whose log-prob is −inf.

    Raises: Refused if the server does not score given tokens; ServerError if the answer is incomplete.
    """
    answer = client.post(
        "/inference/v1/generate",
        {
            "model": model,
            "token_ids": list(token_ids),
            "sampling_params": {
                "max_tokens": 1,  # vLLM's minimum
                "temperature": 0,
                "detokenize": False,
                "prompt_logprob_token_ids": rows.tolist(),
                "prompt_logprob_start": len(token_ids) - len(rows) - 1,  # predicts the first of the last L tokens
            },
        },
        GivenAnswer,
    )
    check_model(answer.model, model, client.url)
    if answer.prompt_token_id_logprobs is None:
        raise Refused(f"{client.url}: expected log-probs of the given tokens, got none")
    try:
        return torch.from_numpy(float_array(answer.prompt_token_id_logprobs, rows.shape))
    except ValueError as error:
        raise ServerError(f"{client.url}: log-probs of given tokens: {' '.join(str(error).split())[:200]}") from error


def refusal(client: VLLMClient, model: str) -> str:
    """Why the server does not score given tokens, in one line; "" if it does.

    Raises: ServerError if it fails in another way.
    """
    try:
        given_logprobs(client, model, [0, 0], torch.tensor([[0]]))
    except Refused as error:
        return str(error)
    return ""
