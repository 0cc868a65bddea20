"""Makes rollouts of a server's answer, and checks that it is complete and about what was asked."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from rlkd.generation.sampler import Sampling
from rlkd.servers.client import ServerError, check_ids, is_possible, possible
from rlkd.servers.responses import GenerateAnswer, Generated, in_order
from rlkd.types import FinishReason, Prompt, Rollout, VersionSpan


def read_rollouts(
    answer: GenerateAnswer,
    prompt: Prompt,
    n: int,
    sampling: Sampling,
    ends: Collection[int],
    vocabulary: int,
    version: Callable[[str], int],
    where: str,
) -> list[Rollout]:
    """The n completions of `prompt` in `answer`, in order.

    Args:
        ends: the token ids that end a completion.
        vocabulary: how many ids are tokens of the run (vocabulary.py).
        version: our weight version, by the one that the server reports; it may raise ServerError.
        where: the server and the prompt, for messages.

    Raises: ServerError, one line, if the answer is incomplete, not finite, or not what was asked for.
    """
    try:
        places = in_order([choice.index for choice in answer.choices], n)
    except ValueError as error:
        raise ServerError(f"{where}: {error}") from error

    def one(choice: Generated) -> Rollout:
        token_ids = choice.token_ids or []
        logprobs = sampled_logprobs(choice, where)
        check_ids(token_ids, vocabulary, where)
        return Rollout(
            prompt=prompt,
            token_ids=tuple(token_ids),
            logprobs=logprobs,
            finish_reason=_finish_reason(choice, sampling.max_tokens, ends, where),
            weight_versions=_spans(choice, version, where),
            top_ids=likeliest(choice, sampling.top_k) if sampling.top_k else None,
        )

    return [one(answer.choices[place]) for place in places]


def _finish_reason(choice: Generated, max_tokens: int, ends: Collection[int], where: str) -> FinishReason:
    """Why the completion ended. Raises: ServerError if its tokens and what the server reports do not agree."""
    token_ids, reported = choice.token_ids or [], choice.finish_reason
    reason: FinishReason = "stop" if token_ids and token_ids[-1] in ends else "length"
    too_long = len(token_ids) > max_tokens or (reported == "length" and len(token_ids) != max_tokens)
    if not token_ids or reported != reason or too_long:
        raise ServerError(
            f"{where}: expected a completion that ends with an end-of-sequence token ('stop') or after "
            f"{max_tokens} tokens ('length'), got {len(token_ids)} tokens and {str(reported)[:40]!r}"
        )
    return reason


def _spans(choice: Generated, version: Callable[[str], int], where: str) -> tuple[VersionSpan, ...]:
    """The weight version of each token. Raises: ServerError if a token has none or several."""
    count, spans = len(choice.token_ids or []), choice.weight_versions or []
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or sorted(set(ends)) != ends or ends[-1] != count:
        raise ServerError(f"{where}: expected one weight version for each of {count} tokens")
    return tuple(VersionSpan(start=span.start, end=span.end, version=version(span.version)) for span in spans)


def sampled_logprobs(choice: Generated, where: str) -> tuple[float, ...]:
    """The log-prob of every sampled token of a completion.

    Raises: ServerError if a log-prob is missing, belongs to another token, or is vLLM's placeholder for −inf and NaN.
    """
    token_ids = choice.token_ids or []
    content = (choice.logprobs.content if choice.logprobs is not None else None) or []
    if len(content) != len(token_ids):
        raise ServerError(f"{where}: {len(token_ids)} tokens but {len(content)} log-probs")
    logprobs = []
    for position, (token, entry) in enumerate(zip(token_ids, content, strict=True)):
        if entry.token_id != token:
            raise ServerError(f"{where}: token {position} is {token}, but its log-prob is of token {entry.token_id}")
        logprobs.append(possible(entry.logprob, f"{where}: the log-prob of token {position}"))
    return tuple(logprobs)


def likeliest(choice: Generated, k: int) -> Tensor:
    """[L, k] ids: the most likely tokens at each position of a completion; −1 if the response has fewer.

    An entry has the sampled token, which need not be among the most likely, followed by the most likely tokens.
    """
    assert choice.logprobs is not None and choice.logprobs.content, "call sampled_logprobs first"
    entries = choice.logprobs.content
    ids = torch.full((len(entries), k), -1)
    for row, entry in enumerate(entries):
        logprobs = {one.token_id: one.logprob for one in entry.top_logprobs if is_possible(one.logprob)}
        best = sorted(logprobs, key=lambda token: (-logprobs[token], token))[:k]
        ids[row, : len(best)] = torch.tensor(best)
    return ids
