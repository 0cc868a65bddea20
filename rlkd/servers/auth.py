"""The key of a vLLM server: required on every route except /health, and sent by our client.

vLLM's own `--api-key` leaves the routes that change weights, pause or profile open to anyone who reaches the port. So
our servers run with `--middleware rlkd.servers.auth.KeyGuard`, before any of vLLM's routing.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

VARIABLE = "RLKD_SERVER_KEY"
"""Environment variable that gives a server process its key. `key_env` may name another one for the client."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class KeyGuard:
    """ASGI middleware: answers 401 to every request without `Authorization: Bearer KEY`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        """Raises: ValueError when the process has no key, so that the server does not start."""
        key = os.environ.get(VARIABLE)
        if not key:
            raise ValueError(f"{VARIABLE}: expected the server's key, got nothing; set this environment variable")
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._authorized(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: an HTTP 403
        else:
            await send(
                {
                    "type": "http.response.start",
                    "status": 401,
                    "headers": [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")],
                }
            )
            body = (
                b'{"error": {"message": "expected the key of this server, got none or a wrong one; '
                b'send Authorization: Bearer KEY"}}'
            )
            await send({"type": "http.response.body", "body": body})

    def _authorized(self, headers: list[tuple[bytes, bytes]]) -> bool:
        sent = [value for name, value in headers if name == b"authorization"]
        return len(sent) == 1 and hmac.compare_digest(sent[0], self._expected)
