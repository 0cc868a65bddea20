"""A teacher behind one or more vLLM servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlkd.builtin import resolve
from rlkd.config.schema import Config, ServedTeacherConfig
from rlkd.data.seeds import request_seed
from rlkd.generation.sampler import Sampling, end_ids
from rlkd.generation.vllm import VLLMSampler
from rlkd.losses.lm_head import OutputLayer
from rlkd.models.vocabulary import padding, vocabulary_size
from rlkd.servers.client import ServerError, VLLMClient, check_ids, check_model, is_possible, possible
from rlkd.servers.command import ServerRole
from rlkd.servers.pool import Answer, Job, ServerPool
from rlkd.servers.process import server_counts
from rlkd.servers.responses import CompletionsAnswer, Figure, GivenAnswer, float_array, in_order
from rlkd.teachers.teacher import FixedTeacher, Question, check_scorable
from rlkd.types import Completion, Signal, TeacherScores

_PER_REQUEST = 16
_AT_ONCE = 16
"""Requests under way at one server."""

_ARGUMENTS = ("--enable-scale-out", "--max-num-batched-tokens", "2048", "--max-logprobs", "-1")
"""The route that scores tokens of our choice; and since vLLM holds the log-probs of all scheduled prompt tokens over
the whole vocabulary at once, 4 bytes each, few of them. It answers with the top 20 at most, unless told otherwise."""


def teacher_role(config: Config, teacher: ServedTeacherConfig) -> ServerRole:
    """What a server of `teacher` must be started as."""
    return ServerRole(
        name="teacher",
        model=resolve(teacher.path),
        max_model_len=teacher_longest(config),
        padding=padding(config.model, teacher.path),
        arguments=_ARGUMENTS,
    )


def teacher_longest(config: Config) -> int:
    """Tokens of the longest sequence that a teacher's server sees: it generates one beyond what it scores."""
    return sum(config.algorithm.teacher_lengths(config).values()) + 1


class _ServedScorer(FixedTeacher):
    """Asks servers for the log-probs of a prompt: prompt and completion, taken together."""

    pool: ServerPool

    def __init__(self, ends: Sequence[int], vocabulary: int) -> None:
        """
        Args:
            ends: token ids that end what the teacher writes.
            vocabulary: it writes only ids below this one (vocabulary.py).
        """
        self._ends = tuple(ends)
        self._vocabulary = vocabulary

    def _run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer]) -> list[Answer]:
        raise NotImplementedError

    def score(self, questions: Sequence[Question], signal: Signal) -> list[TeacherScores]:
        """See `Teacher.score`. Hidden states do not leave a server: `signal.tier` is sampled, top_k or given.

        Raises: ServerError when the servers are gone or an answer is not complete and finite.
        """
        check_scorable(questions)
        size = 1 if signal.tier == "given" else _PER_REQUEST
        parts = [questions[start : start + size] for start in range(0, len(questions), size)]

        def one(client: VLLMClient, model: str, part: Sequence[Question]) -> list[TeacherScores]:
            if signal.tier == "given":
                return [request_given(client, model, question) for question in part]
            return request_scores(client, model, part, signal)

        return [scores for answer in self._run(parts, one) for scores in answer]

    def layers(self) -> tuple[OutputLayer, ...]:
        return ()

    def write(self, questions: Sequence[Question], sampling: Sampling, iteration: int) -> list[Completion]:
        """See `Teacher.write`. Raises: ServerError as `score` does."""

        def one(client: VLLMClient, model: str, question: Question) -> Completion:
            seed = request_seed(sampling.seed, iteration, f"teacher/{question.name}")
            completion = request_completion(client, model, question.prompt, sampling, seed, self._ends)
            check_ids(completion.token_ids, self._vocabulary, client.url)
            return completion

        return self._run(questions, one)


class ServedTeacher(_ServedScorer):
    """A frozen model behind one or more servers. See `Teacher` for the protocol.

    Its scores are at temperature 1: vLLM applies no temperature to them. Servers that go away are waited for.
    """

    def __init__(self, config: Config, teacher: ServedTeacherConfig) -> None:
        super().__init__(end_ids(teacher.path, config.model.trust_remote_code), vocabulary_size(config.model))
        self._config = config
        self._settings = teacher
        self._model_path = resolve(teacher.path)
        self._longest = teacher_longest(config)
        self.pool = ServerPool(teacher_role(config, teacher), teacher.server, self._longest)

    def start(self) -> None:
        """Raises: RunStopped when the server cannot be started."""
        if self._settings.server.launch:
            of_policy, of_teacher = server_counts(self._config)
            self.pool.start(self._config.run_dir, slots=(of_policy, of_policy + of_teacher))

    def open(self) -> None:
        """Raises: RunStopped when the server does not come up, cannot be reached, or serves another model."""
        self.pool.open(self._settings.addresses, self._model_path)

    def _run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer]) -> list[Answer]:
        def is_the_teacher(client: VLLMClient) -> None:
            client.model_card(self._model_path, self._longest)

        return self.pool.run(jobs, act, _AT_ONCE, patient=is_the_teacher)

    def close(self) -> None:
        """Ends the servers that we started; lets go of the others."""
        self.pool.close()


class PolicyServerTeacher(_ServedScorer):
    """The student as its own teacher: the servers that sample also score."""

    def __init__(self, policy: VLLMSampler, ends: Sequence[int], base: bool = False) -> None:
        """
        Args:
            ends: see `_ServedScorer`.
            base: by the model that adapters are on top of, the student's start; else by the live student.
        """
        super().__init__(ends, policy.vocabulary)
        self._policy = policy
        self._base = base
        self.pool = policy.pool

    def start(self) -> None:
        pass

    def open(self) -> None:
        """The sampler opens its servers."""

    def _run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer]) -> list[Answer]:
        if self._base:
            answers = self.pool.run(jobs, act, _AT_ONCE, patient=None)
        else:
            answers = self._policy.run(jobs, act, _AT_ONCE)
        self._policy.check_version()  # a score does not say which weights it is of
        return answers

    def close(self) -> None:
        """They belong to the sampler."""


def request_scores(
    client: VLLMClient, model: str, questions: Sequence[Question], signal: Signal
) -> list[TeacherScores]:
    """Ask one server once. Raises: ServerError when the answer is not complete and finite."""
    assert signal.tier != "hidden", "hidden states do not leave a server"
    answer = client.post(
        "/v1/completions",
        {
            "model": model,
            "prompt": [[*q.prompt, *q.completion] for q in questions],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": signal.k,  # besides the actual token's
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


def request_given(client: VLLMClient, model: str, question: Question) -> TeacherScores:
    """Ask one server for the log-probs of the completion and of `question.ids`.

    Raises: ServerError when the answer is not complete and finite, or the server has vLLM's old runner (on a CPU).
    """
    assert question.ids is not None, "the question names no tokens"
    actual = torch.tensor(question.completion)[:, None]
    rows = torch.cat([actual, question.ids], dim=1)
    answer = client.post(
        "/inference/v1/generate",
        {
            "model": model,
            "token_ids": [*question.prompt, *question.completion],
            "sampling_params": {
                "max_tokens": 1,  # vLLM insists
                "temperature": 0,
                "detokenize": False,
                "prompt_logprob_token_ids": rows.tolist(),
                "prompt_logprob_start": len(question.prompt) - 1,  # what the first completion token is predicted from
            },
        },
        GivenAnswer,
    )
    check_model(answer.model, model, client.url)
    if answer.prompt_token_id_logprobs is None:
        raise ServerError(f"{client.url}: no log-probs of the tokens that were to be scored")
    try:
        figures = torch.from_numpy(float_array(answer.prompt_token_id_logprobs, rows.shape))
    except ValueError as error:
        raise ServerError(f"{client.url}: log-probs of given tokens: {' '.join(str(error).split())[:200]}") from error
    if not figures[:, 0].isfinite().all() or figures.isnan().any() or (figures == torch.inf).any():
        raise ServerError(f"{client.url}: a log-prob is NaN, or that of a completion token not finite")
    absent = figures[:, 1:] == -torch.inf
    return TeacherScores(
        logprobs=tuple(figures[:, 0].tolist()),
        top_ids=question.ids.masked_fill(absent, -1),
        top_logprobs=figures[:, 1:],
    )


def request_completion(
    client: VLLMClient, model: str, prompt: Sequence[int], sampling: Sampling, seed: int, ends: Sequence[int]
) -> Completion:
    """One completion by a plain server. Raises: ServerError when the answer is not complete and finite."""
    answer = client.post(
        "/v1/completions",
        {
            "model": model,
            "prompt": [list(prompt)],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            # a greedy request needs none, and on a CPU vLLM 0.32 can die of a seeded prefill in two parts
            **({"seed": seed} if sampling.temperature > 0 else {}),
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,  # stop at our ids and at no others
            "stop_token_ids": sorted(ends),
            "include_stop_str_in_output": True,
        },
        CompletionsAnswer,
    )
    check_model(answer.model, model, client.url)
    if len(answer.choices) != 1:
        raise ServerError(f"{client.url}: {len(answer.choices)} completions, wanted 1")
    (choice,) = answer.choices
    token_ids = tuple(choice.token_ids or ())
    figures = choice.logprobs.token_logprobs if choice.logprobs is not None else []
    if len(token_ids) != len(figures) or not 0 < len(token_ids) <= sampling.max_tokens:
        raise ServerError(
            f"{client.url}: {len(token_ids)} tokens, {len(figures)} log-probs; wanted as many of both, 1 to "
            f"{sampling.max_tokens}"
        )
    what = f"{client.url}: the log-prob of written token"
    logprobs = tuple(possible(figure, f"{what} {i}") for i, figure in enumerate(figures))
    ended = token_ids[-1] in ends
    return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason="stop" if ended else "length")


def top_logprobs(entries: Sequence[Mapping[int, Figure] | None], k: int) -> tuple[Tensor, Tensor]:
    """([L, k] ids, [L, k] log-probs), likeliest first. Where the vocabulary has fewer tokens, the id is −1.

    An entry has the k likeliest tokens and, if it is none of them, the actual one.
    """
    ids = torch.full((len(entries), k), -1)
    logprobs = torch.full((len(entries), k), -torch.inf)
    for row, entry in enumerate(entries):
        figures = [(one.logprob, token) for token, one in (entry or {}).items() if is_possible(one.logprob)]
        best = sorted(figures, reverse=True)[:k]
        ids[row, : len(best)] = torch.tensor([token for _, token in best])
        logprobs[row, : len(best)] = torch.tensor([logprob for logprob, _ in best])
    return ids, logprobs


def completion_logprobs(
    entries: Sequence[Mapping[int, Figure] | None], prompt: Sequence[int], completion: Sequence[int], where: str
) -> tuple[float, ...]:
    """The log-prob of each completion token out of vLLM's `prompt_logprobs`, one entry (token id → figure) a token.

    Raises: ServerError for one that is missing, or vLLM's stand-in for −inf.
    """
    length = len(prompt) + len(completion)
    if len(entries) != length:
        raise ServerError(f"{where}: {length} tokens were to be scored, the answer has {len(entries)}")
    logprobs = []
    for position, token in enumerate(completion):
        figure = (entries[len(prompt) + position] or {}).get(token)
        if figure is None:
            raise ServerError(f"{where}: no log-prob of completion token {position}, which is {token}")
        logprobs.append(possible(figure.logprob, f"{where}: the log-prob of completion token {position}"))
    return tuple(logprobs)
