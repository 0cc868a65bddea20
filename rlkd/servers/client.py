"""The HTTP client of one vLLM server."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import httpx
import tenacity
import torch

from rlkd.distributed import RunStopped
from rlkd.servers.responses import A, ModelList, ServerInfo, WeightInfo, parse

IMPOSSIBLE_LOGPROB = -9999.0
"""vLLM's HTTP layer writes this for −inf, NaN and a missing log-prob; it is never a value."""


ROUNDING = 1e-3
"""How far above 0 a log-prob in half precision may come out."""


_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
]
"""Treat a machine that is silent for 90 seconds as gone: 30 s idle, then 6 probes 10 s apart."""


class ServerError(RunStopped):
    """A request that the server refused, failed or never answered."""


class ServerLost(ServerError):
    """The server is gone, or has lost the weights it was sent. It may come back and can be sent them again."""


class Refused(ServerError):
    """The server is well, but does not do what it was asked: it has no such route, or does not accept the request."""


class UnknownModel(ServerError):
    """The server has no model or adapter of the requested name."""


class VLLMClient:
    """Requests to one server. Safe to use from several threads.

    Only a failed connection is retried, since no server has seen that request. Every other failure raises a one-line
    ServerError, or a ServerLost where the server itself is gone.
    """

    def __init__(self, url: str, timeout_s: float, key: str | None = None) -> None:
        """
        Args:
            timeout_s: seconds within which a request must be answered.
            key: the server's key (auth.py); None: the server needs none.
        """
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=10.0, pool=None),
            # Without keep-alive probes a read from a machine that has vanished would wait for the whole time-out.
            transport=httpx.HTTPTransport(limits=httpx.Limits(max_connections=None), socket_options=_KEEPALIVE),
            # Never reuse a connection: the server closes it after an error or five idle seconds, and a request sent
            # just then fails although nothing is wrong. We use a header rather than a limit of zero kept
            # connections: with that limit, one httpx thread passes on a finished connection while another closes it.
            headers={"Connection": "close", **({} if key is None else {"Authorization": f"Bearer {key}"})},
            trust_env=False,
        )

    def get(self, path: str, kind: type[A]) -> A:
        """GET `path` and parse the answer as `kind`, a class of responses.py."""
        return self._read("GET", path, self._request("GET", path, None, None), kind)

    def post(
        self, path: str, body: Mapping[str, Any] | None, kind: type[A], query: Mapping[str, str] | None = None
    ) -> A:
        """POST `body` to `path` and parse the answer as `kind`, a class of responses.py."""
        return self._read("POST", path, self._request("POST", path, body, query), kind)

    def order(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> None:
        """Send a request and check that the answer is 200; its body is not read."""
        self._request(method, path, body, query)

    def _read(self, method: str, path: str, response: httpx.Response, kind: type[A]) -> A:
        try:
            return parse(response.content, kind)
        except ValueError as error:
            content_type = response.headers.get("content-type", "application/json")
            as_what = "" if content_type.startswith("application/json") else f" (as {content_type[:40]!r})"
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
            # A healthy server that fails would fail again; a gateway answers 502 to 504 for a lost server.
            code = response.status_code
            lost = code in (502, 503, 504) or (code >= 500 and not self.healthy())
            message = f"{method} {self.url}{path} answered {code}: {_message(response)}"
            if code == 401:
                message += "; set the environment variable that key_env names to the server's key"
            unknown = code == 404 and body is not None and f"The model `{body.get('model')}` does not exist" in message
            refused = code in (400, 404, 405, 422)
            raise (ServerLost if lost else UnknownModel if unknown else Refused if refused else ServerError)(message)
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
        """Whether the server reports that its engine is alive. Never raises, never retries."""
        try:
            return self._http.get("/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def model_card(self, model: str, longest: int) -> str:
        """The name under which the server offers `model`.

        Args:
            model: the name that we gave our own server, or the folder or hub id that an external server should serve.
            longest: prompt + completion tokens of the longest request.

        Raises: ServerError when it serves another model, or allows only shorter requests.
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
            f"{self.url}: expected a server of {model!r}, got one of {offered}; correct the address, or start that "
            f"server with --served-model-name {model}"
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

    def settings(self) -> tuple[torch.dtype, int]:
        """(the dtype of the model that the server runs, how many sequences it batches)."""
        info = self.get("/server_info?config_format=json", ServerInfo)
        dtype = getattr(torch, info.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ServerError(f"{self.url}: expected the model's dtype in /server_info, got {info.dtype[:40]!r}")
        return dtype, info.sequences

    def close(self) -> None:
        self._http.close()


def _same_model(served: str, expected: str) -> bool:
    """Whether two folders or hub ids are one model. Full paths are compared, as every student is exported as `hf`."""
    if os.path.isdir(expected) and os.path.isabs(served):
        return os.path.realpath(served) == os.path.realpath(expected)
    return os.path.basename(served.rstrip("/")) == os.path.basename(expected.rstrip("/"))


def check_model(answered: str, model: str, where: str) -> None:
    """Raises: ServerError when `answered`, the model that the answer names, is not `model`."""
    if answered != model:
        raise ServerError(f"{where}: expected an answer of model {model!r}, got one of {answered[:200]!r}")


def check_ids(token_ids: Sequence[int], vocabulary: int, where: str) -> None:
    """Raises: ServerError for an id that is no token of the run (vocabulary.py)."""
    highest = max(token_ids, default=-1)
    if highest >= vocabulary:
        raise ServerError(
            f"{where}: the completion has token {highest}, but the tokenizer's ids end at {vocabulary - 1}; start the "
            "server by python -m rlkd.serve, which leaves padded rows out"
        )


def is_possible(logprob: float | None) -> TypeGuard[float]:
    """Whether `logprob` is a valid log-prob: not missing, not vLLM's placeholder, and not above 0."""
    return logprob is not None and IMPOSSIBLE_LOGPROB < logprob <= ROUNDING


def possible(logprob: float | None, what: str) -> float:
    """Return a valid `logprob`. Raises: ServerError when it is missing, vLLM's placeholder or above 0."""
    if not is_possible(logprob):
        raise ServerError(
            f"{what}: expected a log-prob, got {logprob}, which is NaN, −inf or missing in the server, or above 0"
        )
    return logprob


def parse_version(version: str, where: str) -> int:
    """One of our weight versions as an integer.

    Raises: ServerLost for "default", the version of a server that was never sent weights; ServerError for other text.
    """
    if version == "default":
        raise ServerLost(
            f"{where} holds its start weights (version 'default'): it was restarted, or never given the policy's; "
            "publish before sampling"
        )
    if not (version.isascii() and version.isdecimal() and len(version) < 20):
        raise ServerError(
            f"{where}: expected a number as weight version, got {version[:40]!r}; let only this run update its weights"
        )
    return int(version)


def _message(response: httpx.Response) -> str:
    """The server's own error message, in one line."""
    text = response.text
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        body = None  # e.g. a proxy's page: use its text unchanged
    if isinstance(body, dict):
        error = body.get("error", body.get("detail", text))
        text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
    return " ".join(text.split())[:300]
