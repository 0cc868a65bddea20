"""A teacher behind one or more vLLM servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlkd import config as configuration
from rlkd import distributed
from rlkd.config import Config
from rlkd.distributed import on_rank_zero
from rlkd.rollout.client import IMPOSSIBLE_LOGPROB, ServerError, VLLMClient
from rlkd.rollout.server import VLLMServer, launch, server_counts, wait_ready
from rlkd.tiny import resolve
from rlkd.types import TeacherScores

Pair = tuple[Sequence[int], Sequence[int]]

_PAIRS_PER_REQUEST = 16
_MAX_REQUESTS = 16
"""At a time and server."""

TEACHER_ARGUMENTS = ("--max-num-batched-tokens", "2048")
"""vLLM holds the log-probs of all scheduled prompt tokens over the whole vocabulary at once, 4 bytes each."""


class ServedTeacher:
    """Implements `Teacher` by asking for the log-probs of a prompt: prompt and completion, taken together.

    Its scores are at temperature 1: vLLM applies no temperature to them.
    """

    def __init__(self, config: Config) -> None:
        assert isinstance(config.teacher, configuration.ServedTeacher)
        self._config = config
        self._settings = config.teacher
        self._model_path = resolve(config.teacher.path)
        # the server insists on generating one token beyond what it scores
        self._longest = config.data.max_prompt_tokens + config.rollout.max_tokens + 1
        self._servers: list[VLLMServer] = []
        self._clients: list[VLLMClient] = []
        self._models: list[str] = []

    def start(self) -> None:
        """Raises: RuntimeError when the server cannot be started."""
        if self._settings.server.launch:
            on_rank_zero(self._launch)

    def open(self) -> None:
        """Raises: RuntimeError when the server does not come up, cannot be reached, or serves another model."""
        server = self._settings.server
        if server.launch:
            urls = on_rank_zero(lambda: wait_ready(self._servers))
        else:
            assert self._settings.url is not None
            urls = [self._settings.url]
        for url in urls:
            client = VLLMClient(url, server.request_timeout_s)
            self._clients.append(client)
            self._models.append(client.model_card(self._model_path, self._longest))

    def _launch(self) -> None:
        of_policy, of_teacher = server_counts(self._config)
        self._servers = launch(
            self._settings.server,
            role="teacher",
            model=self._model_path,
            max_model_len=self._longest,
            run_dir=self._config.run_dir,
            slots=(of_policy, of_policy + of_teacher),
            arguments=TEACHER_ARGUMENTS,
        )

    def score(self, pairs: Sequence[Pair]) -> list[TeacherScores]:
        """See `Teacher.score`.

        Raises: RuntimeError when a server fails or its answer is not complete and finite.
        """
        for prompt, completion in pairs:
            if not prompt or not completion:
                raise ValueError(
                    f"a teacher needs a prompt and a completion, got {len(prompt)} and {len(completion)} tokens"
                )
        requests = [pairs[start : start + _PAIRS_PER_REQUEST] for start in range(0, len(pairs), _PAIRS_PER_REQUEST)]

        def one(job: tuple[int, Sequence[Pair]]) -> list[TeacherScores]:
            # ranks start at different servers, since each may have a request or two only
            which = (job[0] + distributed.rank()) % len(self._clients)
            return self._request(self._clients[which], self._models[which], job[1])

        with ThreadPoolExecutor(_MAX_REQUESTS * len(self._clients)) as pool:
            try:
                return [scores for answer in pool.map(one, enumerate(requests)) for scores in answer]
            except ServerError:
                pool.shutdown(wait=False, cancel_futures=True)
                for server in self._servers:
                    server.check_alive()  # a death says more than a broken connection
                raise

    def _request(self, client: VLLMClient, model: str, pairs: Sequence[Pair]) -> list[TeacherScores]:
        answer = client.post(
            "/v1/completions",
            {
                "model": model,
                "prompt": [[*prompt, *completion] for prompt, completion in pairs],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,  # of the actual token alone
            },
        )
        if answer["model"] != model:
            raise ServerError(f"{client.url}: answered by model {answer['model']!r}, wanted {model!r}")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(pairs):
            raise ServerError(f"{client.url}: {len(choices)} answers to {len(pairs)} prompts")
        return [
            TeacherScores(logprobs=completion_logprobs(choice["prompt_logprobs"], prompt, completion, client.url))
            for choice, (prompt, completion) in zip(choices, pairs, strict=True)
        ]

    def close(self) -> None:
        """Ends the servers that we started; lets go of the others."""
        for server in self._servers:
            server.stop()
        for client in self._clients:
            client.close()
        self._servers, self._clients, self._models = [], [], []


def completion_logprobs(
    entries: Sequence[Mapping[str, Mapping[str, Any]] | None] | None,
    prompt: Sequence[int],
    completion: Sequence[int],
    where: str,
) -> tuple[float, ...]:
    """The log-prob of each completion token out of vLLM's `prompt_logprobs`, one entry (token id → figures) a token.

    Raises: ServerError for one that is missing, or vLLM's stand-in for −inf.
    """
    length = len(prompt) + len(completion)
    if entries is None or len(entries) != length:
        got = "none" if entries is None else len(entries)
        raise ServerError(f"{where}: {length} tokens were to be scored, the answer has {got}")
    logprobs = []
    for position, token in enumerate(completion):
        entry = (entries[len(prompt) + position] or {}).get(str(token))
        if entry is None:
            raise ServerError(f"{where}: no log-prob of completion token {position}, which is {token}")
        if entry["logprob"] is None or not entry["logprob"] > IMPOSSIBLE_LOGPROB:
            raise ServerError(
                f"{where}: the log-prob of completion token {position} is {entry['logprob']}: NaN or −inf in the server"
            )
        logprobs.append(float(entry["logprob"]))
    return tuple(logprobs)
