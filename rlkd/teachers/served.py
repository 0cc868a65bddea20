"""A teacher behind one or more vLLM servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlkd.builtin import resolve
from rlkd.config.schema import Config, ServedTeacherConfig
from rlkd.data.seeds import request_seed
from rlkd.generation.sampler import Sampling, eos_ids
from rlkd.generation.vllm import VLLMSampler
from rlkd.models.vocabulary import padding, vocabulary_size
from rlkd.servers.client import ROUNDING, ServerError, VLLMClient, check_ids, check_model, is_possible, possible
from rlkd.servers.command import ServerRole
from rlkd.servers.given import given_logprobs
from rlkd.servers.pool import Answer, Job, ServerPool
from rlkd.servers.responses import CompletionsAnswer, LogprobEntry, in_order
from rlkd.teachers.teacher import FixedTeacher, ScoreRequest, check_scorable
from rlkd.types import Completion, Signal, TeacherScores

_PER_REQUEST, _AT_ONCE = 16, 16
"""Sequences in a request to /v1/completions, and requests in progress at one server."""

_GIVEN_AT_ONCE = 64
"""Requests in progress at one server that each score one sequence by given tokens. vLLM 0.32 prefills 8,192 tokens at a
time on an H100: with 64, even sequences of 256 tokens fill one step while the next one waits."""

_ARGUMENTS = ("--enable-scale-out", "--max-logprobs", "-1")
"""vLLM needs --enable-scale-out for the route that scores given tokens. By default it returns at most the top 20."""

_ON_A_CPU = ("--max-num-batched-tokens", "2048")
"""vLLM's old runner, which a CPU has, keeps the log-probs of all scheduled prompt tokens over the full vocabulary in
memory, 4 bytes each, so few tokens are scheduled at a time. The one of GPUs takes 1,024 tokens at a time itself."""


def teacher_role(config: Config, teacher: ServedTeacherConfig) -> ServerRole:
    """How the servers of `teacher` must be started."""
    return ServerRole(
        name="teacher",
        model=resolve(teacher.path),
        max_model_len=teacher_longest(config),
        padding=padding(config.model, teacher.path),
        arguments=(
            *_ARGUMENTS,
            *(() if torch.cuda.is_available() else _ON_A_CPU),
            *(("--trust-remote-code",) if config.model.trust_remote_code else ()),
        ),
    )


def teacher_longest(config: Config) -> int:
    """The length of the longest sequence at a teacher's server, in tokens; vLLM generates one more than it scores."""
    return sum(config.algorithm.teacher_lengths(config).values()) + 1


class _ServedScorer(FixedTeacher):
    """Scores completions by requesting the prompt log-probs of prompt and completion together from servers."""

    in_process = False
    pool: ServerPool

    def __init__(self, ends: Sequence[int], vocabulary: int) -> None:
        """
        Args:
            ends: token ids that end a completion by the teacher.
            vocabulary: the teacher writes only ids below it (vocabulary.py).
        """
        self._ends = tuple(ends)
        self._vocabulary = vocabulary

    def _run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer], at_once: int) -> list[Answer]:
        raise NotImplementedError

    def score(self, questions: Sequence[ScoreRequest], signal: Signal) -> list[TeacherScores]:
        """See `Teacher.score`. A server does not return hidden states: `signal.tier` is sampled, top_k or given.

        Raises: ServerError if the servers are lost or a response is incomplete or not finite.
        """
        check_scorable(questions)
        by_given = signal.tier == "given" or (signal.tier == "sampled" and self.pool.scores_given)
        if signal.tier == "sampled":
            questions = [replace(question, ids=None) for question in questions]
        size, at_once = (1, _GIVEN_AT_ONCE) if by_given else (_PER_REQUEST, _AT_ONCE)
        parts = [questions[start : start + size] for start in range(0, len(questions), size)]

        def one(client: VLLMClient, model: str, part: Sequence[ScoreRequest]) -> list[TeacherScores]:
            if by_given:
                return [request_given(client, model, question) for question in part]
            return request_scores(client, model, part, signal)

        return [scores for answer in self._run(parts, one, at_once) for scores in answer]

    def write(self, questions: Sequence[ScoreRequest], sampling: Sampling, iteration: int) -> list[Completion]:
        """See `Teacher.write`. Raises: ServerError, see `score`."""

        def one(client: VLLMClient, model: str, question: ScoreRequest) -> Completion:
            seed = request_seed(sampling.seed, iteration, f"teacher/{question.name}")
            completion = request_completion(client, model, question.prompt, sampling, seed, self._ends)
            check_ids(completion.token_ids, self._vocabulary, client.url)
            return completion

        return self._run(questions, one, _AT_ONCE)


class ServedTeacher(_ServedScorer):
    """A frozen model on one or more servers. See `Teacher` for the protocol.

    Its scores are at temperature 1, since vLLM applies no temperature to prompt log-probs. If all servers are lost, it
    waits until one is back.
    """

    def __init__(self, config: Config, teacher: ServedTeacherConfig) -> None:
        super().__init__(eos_ids(teacher.path, config.model.trust_remote_code), vocabulary_size(config.model))
        self._config = config
        self._settings = teacher
        self._model_path = resolve(teacher.path)
        self._longest = teacher_longest(config)
        self.pool = ServerPool(teacher_role(config, teacher), teacher.server, self._longest)

    def start(self) -> None:
        """Start the servers if `launch` is set. Raises: RunStopped if one cannot be started."""
        if self._settings.server.launch:
            self.pool.start(self._config)

    def open(self) -> None:
        """Connect to the servers.

        Raises: RunStopped if a server does not come up, cannot be reached, or serves another model.
        """
        self.pool.open(self._settings.addresses, self._model_path)
        self.pool.find_route(self._config.algorithm.scores_given)

    def _run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer], at_once: int) -> list[Answer]:
        def is_the_teacher(client: VLLMClient) -> None:
            client.model_card(self._model_path, self._longest)

        return self.pool.run(jobs, act, at_once, reconnect=is_the_teacher)

    def close(self) -> None:
        """Stop the servers that this run started, and disconnect from the others."""
        self.pool.close()


class PolicyServerTeacher(_ServedScorer):
    """The student as its own teacher: the servers that sample also score its tokens."""

    def __init__(self, policy: VLLMSampler, ends: Sequence[int], base: bool = False) -> None:
        """
        Args:
            ends: see `_ServedScorer`.
            base: True: score with the base model without adapters, which is the initial student. False: score with the
                current student.
        """
        super().__init__(ends, policy.vocabulary)
        self._policy = policy
        self._base = base
        self.pool = policy.pool

    @property
    def moves(self) -> bool:
        return not self._base

    def start(self) -> None:
        """Nothing to do; the sampler starts the servers."""

    def open(self) -> None:
        """Nothing to do; the sampler connects to the servers."""

    def _run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer], at_once: int) -> list[Answer]:
        if self._base:
            answers = self.pool.run(jobs, act, at_once, reconnect=None)
        else:
            answers = self._policy.run(jobs, act, at_once)
        self._policy.check_version()  # a response does not name the version of its weights
        return answers

    def close(self) -> None:
        """Nothing to do; the servers belong to the sampler."""


def request_scores(
    client: VLLMClient, model: str, questions: Sequence[ScoreRequest], signal: Signal
) -> list[TeacherScores]:
    """Scores from one request to one server. Raises: ServerError if the response is incomplete or not finite."""
    assert signal.tier != "hidden", "a server does not return hidden states"
    answer = client.post(
        "/v1/completions",
        {
            "model": model,
            "prompt": [[*q.prompt, *q.completion] for q in questions],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": signal.k,  # in addition to that of the actual token
        },
        CompletionsAnswer,
    )
    check_model(answer.model, model, client.url)
    try:
        places = in_order([choice.index for choice in answer.choices], len(questions))
    except ValueError as error:
        raise ServerError(f"{client.url}: {error}") from error
    scores = []
    for place, question in zip(places, questions, strict=True):
        entries = answer.choices[place].prompt_logprobs or []
        logprobs = completion_logprobs(entries, question.prompt, question.completion, client.url)
        ids, values = top_logprobs(entries[len(question.prompt) :], signal.k) if signal.k else (None, None)
        scores.append(TeacherScores(logprobs=logprobs, top_ids=ids, top_logprobs=values))
    return scores


def request_given(client: VLLMClient, model: str, question: ScoreRequest) -> TeacherScores:
    """The log-probs of the completion tokens and, if there are any, of `question.ids`, from one server.

    Raises: ServerError if the response is incomplete or not finite, or the server runs vLLM's old runner (on a CPU).
    """
    actual = torch.tensor(question.completion)[:, None]
    rows = actual if question.ids is None else torch.cat([actual, question.ids], dim=1)
    logprobs = given_logprobs(client, model, [*question.prompt, *question.completion], rows)
    if not logprobs[:, 0].isfinite().all() or logprobs.isnan().any() or (logprobs > ROUNDING).any():
        raise ServerError(f"{client.url}: a log-prob is NaN or above 0, or a completion token's is not finite")
    if question.ids is None:
        return TeacherScores(logprobs=tuple(logprobs[:, 0].tolist()))
    absent = logprobs[:, 1:] == -torch.inf
    return TeacherScores(
        logprobs=tuple(logprobs[:, 0].tolist()),
        top_ids=question.ids.masked_fill(absent, -1),
        top_logprobs=logprobs[:, 1:],
    )


def request_completion(
    client: VLLMClient, model: str, prompt: Sequence[int], sampling: Sampling, seed: int, ends: Sequence[int]
) -> Completion:
    """One completion from a server. Raises: ServerError if the response is incomplete or not finite."""
    answer = client.post(
        "/v1/completions",
        {
            "model": model,
            "prompt": [list(prompt)],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            # greedy requests need no seed, and vLLM 0.32 on a CPU can crash on a seeded prefill in two parts
            **({"seed": seed} if sampling.temperature > 0 else {}),
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,  # stop only at our ids
            "stop_token_ids": sorted(ends),
            "include_stop_str_in_output": True,
        },
        CompletionsAnswer,
    )
    check_model(answer.model, model, client.url)
    if len(answer.choices) != 1:
        raise ServerError(f"{client.url}: expected 1 completion, got {len(answer.choices)}")
    (choice,) = answer.choices
    token_ids = tuple(choice.token_ids or ())
    raw = choice.logprobs.token_logprobs if choice.logprobs is not None else []
    if len(token_ids) != len(raw) or not 0 < len(token_ids) <= sampling.max_tokens:
        raise ServerError(
            f"{client.url}: expected 1 to {sampling.max_tokens} tokens with one log-prob each, got {len(token_ids)} "
            f"tokens and {len(raw)} log-probs"
        )
    what = f"{client.url}: the log-prob of written token"
    logprobs = tuple(possible(logprob, f"{what} {i}") for i, logprob in enumerate(raw))
    ended = token_ids[-1] in ends
    return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason="stop" if ended else "length")


def top_logprobs(entries: Sequence[Mapping[int, LogprobEntry] | None], k: int) -> tuple[Tensor, Tensor]:
    """([L, k] ids, [L, k] log-probs), most likely first. If the vocabulary has fewer than k tokens, the rest is −1.

    An entry has the k most likely tokens and, if it is not among them, the actual token.
    """
    ids = torch.full((len(entries), k), -1)
    logprobs = torch.full((len(entries), k), -torch.inf)
    for row, entry in enumerate(entries):
        candidates = [(one.logprob, token) for token, one in (entry or {}).items() if is_possible(one.logprob)]
        best = sorted(candidates, reverse=True)[:k]
        ids[row, : len(best)] = torch.tensor([token for _, token in best])
        logprobs[row, : len(best)] = torch.tensor([logprob for logprob, _ in best])
    return ids, logprobs


def completion_logprobs(
    entries: Sequence[Mapping[int, LogprobEntry] | None], prompt: Sequence[int], completion: Sequence[int], where: str
) -> tuple[float, ...]:
    """The log-prob of each completion token, from vLLM's `prompt_logprobs`.

    `entries` has one entry (token id → log-prob) for each token of prompt and completion.

    Raises: ServerError if one is missing or vLLM's placeholder for −inf.
    """
    length = len(prompt) + len(completion)
    if len(entries) != length:
        raise ServerError(f"{where}: expected scores of {length} tokens, got {len(entries)}")
    logprobs = []
    for position, token in enumerate(completion):
        scored = (entries[len(prompt) + position] or {}).get(token)
        if scored is None:
            raise ServerError(f"{where}: no log-prob of completion token {position}, which is {token}")
        logprobs.append(possible(scored.logprob, f"{where}: the log-prob of completion token {position}"))
    return tuple(logprobs)
