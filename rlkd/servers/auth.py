"""The key of a vLLM server: asked for on every route but /health, and sent by our client.

vLLM's own `--api-key` leaves the routes that change weights, pause or profile open to whoever reaches the port. So a
server of ours runs with `--middleware rlkd.servers.auth.KeyGuard`, before any of vLLM's routing.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

VARIABLE = "RLKD_SERVER_KEY"
"""Environment variable of a server's process with its key; the configuration may have the client read another."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class KeyGuard:
    """ASGI middleware: without `Authorization: Bearer KEY` the answer is 401, whatever the route and the protocol."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        """Raises: ValueError when the process was given no key; the server does not start then."""
        key = os.environ.get(VARIABLE)
        if not key:
            raise ValueError(f"the server was given no key: set {VARIABLE}")
        self._app = app
        self._wanted = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._knows(scope["headers"]):
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
            body = b'{"error": {"message": "this server asks for its key: Authorization: Bearer KEY"}}'
            await send({"type": "http.response.body", "body": body})

    def _knows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        said = [value for name, value in headers if name == b"authorization"]
        return len(said) == 1 and hmac.compare_digest(said[0], self._wanted)
