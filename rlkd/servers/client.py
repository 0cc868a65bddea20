"""One vLLM server, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import httpx
import tenacity

from rlkd.distributed import RunStopped
from rlkd.servers.responses import A, ModelList, WeightInfo, parse

IMPOSSIBLE_LOGPROB = -9999.0
"""vLLM's HTTP layer writes this for −inf, NaN and a missing log-prob; it is never a value."""


_ROUNDING = 1e-3
"""How far above 0 a log-prob in half precision may come out."""


_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
]
"""A machine that answers nothing for a minute and a half is gone (seconds, and questions without an answer)."""


class ServerError(RunStopped):
    """A request that the server refused, failed or never answered."""


class ServerLost(ServerError):
    """The server is gone, or has lost the weights that it was given: it may come back, and can be given them again."""


class UnknownModel(ServerError):
    """The server has no model, and no adapter, of the name that was asked for."""


class VLLMClient:
    """Requests to one server. Safe to use from several threads.

    Only a connection that could not be made is tried again: such a request has reached nobody. Everything else ends
    in a ServerError of one line, which is a ServerLost where the server itself is gone.
    """

    def __init__(self, url: str, timeout_s: float, key: str | None = None) -> None:
        """
        Args:
            timeout_s: seconds until a request must be answered.
            key: what the server asks for (key_guard.py); None: nothing.
        """
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=10.0, pool=None),
            # Whoever reads from a machine that has vanished would wait for the whole time-out: ask it now and then.
            transport=httpx.HTTPTransport(limits=httpx.Limits(max_connections=None), socket_options=_KEEPALIVE),
            # Never a connection twice: the server closes it after an error or five idle seconds, and a request that
            # is sent just then fails although nothing is wrong. Said in the request and not by a limit of zero kept
            # connections: with that, one thread of httpx hands a finished connection on while another closes it.
            headers={"Connection": "close", **({} if key is None else {"Authorization": f"Bearer {key}"})},
            trust_env=False,
        )

    def get(self, path: str, kind: type[A]) -> A:
        """What `path` answers, as a `kind` of answers.py."""
        return self._read("GET", path, self._request("GET", path, None, None), kind)

    def post(self, path: str, body: Mapping[str, Any], kind: type[A]) -> A:
        """What `path` answers to `body`, as a `kind` of answers.py."""
        return self._read("POST", path, self._request("POST", path, body, None), kind)

    def order(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> None:
        """A request whose answer, if it is 200, says nothing that we read."""
        self._request(method, path, body, query)

    def _read(self, method: str, path: str, response: httpx.Response, kind: type[A]) -> A:
        try:
            return parse(response.content, kind)
        except ValueError as error:
            said = response.headers.get("content-type", "application/json")
            as_what = "" if said.startswith("application/json") else f" (as {said[:40]!r})"
            raise ServerError(
                f"{method} {self.url}{path} answered 200{as_what}, but not as a vLLM server does: {error}"
            ) from error

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, str] | None
    ) -> httpx.Response:
        try:
            response = self._send(method, path, body, query)
        except httpx.HTTPError as error:
            reason = str(error) or "no answer"
            raise ServerLost(f"{method} {self.url}{path}: {type(error).__name__}: {reason}") from error
        if response.status_code != 200:
            # A server that fails but is healthy would fail again; 502 to 504 are a gateway's words for a lost one.
            code = response.status_code
            lost = code in (502, 503, 504) or (code >= 500 and not self.healthy())
            said = f"{method} {self.url}{path} answered {code}: {_message(response)}"
            if code == 401:
                said += "; set the environment variable that key_env names to the server's key"
            unknown = code == 404 and body is not None and f"The model `{body.get('model')}` does not exist" in said
            raise (ServerLost if lost else UnknownModel if unknown else ServerError)(said)
        return response

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type((httpx.ConnectError, httpx.ConnectTimeout)),
        stop=tenacity.stop_after_attempt(4),
        wait=tenacity.wait_exponential(multiplier=0.2, max=2.0),
        reraise=True,
    )
    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, str] | None
    ) -> httpx.Response:
        return self._http.request(method, path, json=body, params=query)

    def healthy(self) -> bool:
        """Whether the server answers that its engine lives. Never raises, never retries."""
        try:
            return self._http.get("/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def model_card(self, model: str, longest: int) -> str:
        """The name under which the server offers `model`.

        Args:
            model: the name that we gave a server of ours, or the folder or hub id that somebody else's should serve.
            longest: prompt + completion tokens of the longest request that will come.

        Raises: ServerError when it serves another model, or none as long as that.
        """
        cards = [card for card in self.get("/v1/models", ModelList).data if card.parent is None]
        for card in cards:
            if model != card.id and not _same_model(card.root or card.id, model):
                continue
            if card.max_model_len is None or card.max_model_len < longest:
                raise ServerError(
                    f"{self.url} was started with --max-model-len {card.max_model_len}, but a prompt and its "
                    f"completion may have {longest} tokens; restart it with --max-model-len {longest}"
                )
            return card.id
        named = ", ".join(repr(c.id) + (f" ({c.root})" if c.root not in (None, c.id) else "") for c in cards)
        offered = " ".join(named[:300].split()) or "no model"
        raise ServerError(
            f"{self.url} serves {offered}, wanted {model!r}; correct the address, or start that server with "
            f"--served-model-name {model}"
        )

    def adapters(self) -> list[str]:
        """The names of the adapters that the server has loaded."""
        return [card.id for card in self.get("/v1/models", ModelList).data if card.parent is not None]

    def weight_version(self) -> int | None:
        """The version of the weights that the server holds; None: those that it was started with.

        Raises: ServerError; a server that was not started for weight updates has no such route.
        """
        version = self.get("/weight_info", WeightInfo).weight_version
        return None if version == "default" else parse_version(version, self.url)

    def close(self) -> None:
        self._http.close()


def _same_model(served: str, wanted: str) -> bool:
    """Whether two folders or hub ids are one model. Two whole paths must agree: every student is exported as `hf`."""
    if os.path.isdir(wanted) and os.path.isabs(served):
        return os.path.realpath(served) == os.path.realpath(wanted)
    return os.path.basename(served.rstrip("/")) == os.path.basename(wanted.rstrip("/"))


def check_model(answered: str, model: str, where: str) -> None:
    """Raises: ServerError when another model has `answered` than `model`."""
    if answered != model:
        raise ServerError(f"{where}: answered by model {answered[:200]!r}, wanted {model!r}")


def check_ids(token_ids: Sequence[int], vocabulary: int, where: str) -> None:
    """Raises: ServerError for an id that is no token of the run (vocabulary.py)."""
    highest = max(token_ids, default=-1)
    if highest >= vocabulary:
        raise ServerError(
            f"{where}: the completion has token {highest}, but the tokenizer's ids end at {vocabulary - 1}; start the "
            "server by python -m rlkd.serve, which leaves padded rows out"
        )


def is_possible(logprob: float | None) -> TypeGuard[float]:
    """Whether it is a log-prob: none that is missing, vLLM's stand-in, or above 0."""
    return logprob is not None and IMPOSSIBLE_LOGPROB < logprob <= _ROUNDING


def possible(logprob: float | None, what: str) -> float:
    """A log-prob that is one. Raises: ServerError for a missing one, for vLLM's stand-in, and above 0."""
    if not is_possible(logprob):
        raise ServerError(f"{what} is {logprob}: NaN, −inf or missing in the server, or no log-prob")
    return logprob


def parse_version(version: str, where: str) -> int:
    """The integer that a weight version of ours is.

    Raises: ServerLost for "default", which a server says that was never given weights; ServerError for anything else.
    """
    if version == "default":
        raise ServerLost(
            f"{where} holds its start weights (version 'default'): it was restarted, or never given the policy's; "
            "publish before sampling"
        )
    if not (version.isascii() and version.isdecimal() and len(version) < 20):
        raise ServerError(
            f"{where} says weight version {version[:40]!r}, not a number: somebody else updates its weights"
        )
    return int(version)


def _message(response: httpx.Response) -> str:
    """The server's own words, in one line."""
    text = response.text
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        body = None  # a proxy's page, say: its words as they stand
    if isinstance(body, dict):
        error = body.get("error", body.get("detail", text))
        text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
    return " ".join(text.split())[:300]
