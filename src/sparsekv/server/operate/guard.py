"""What stands before every route, as ASGI: API keys, the size of a request, and how long a client may take to send it.

The body is read whole here and played back to the route, which sees what comes after it: the client's leaving.
"""

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsekv.server.openai.errors import ApiError
from sparsekv.server.settings import ServerSettings

OPEN = frozenset({"/", "/health", "/ready", "/version", "/metrics"})
"""Paths that need no key: they tell nothing that a client sent."""
OPEN_UNDER = "/page/"
"""The page's own files."""


class Guard:
    def __init__(self, app: ASGIApp, *, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
        except ApiError as refusal:
            refusal.headers["Connection"] = "close"  # what is left of the body is not read
            await refusal.response()(scope, receive, send)
            return
        if body is None:
            return
        played = False

        async def replay() -> Message:
            nonlocal played
            if played:
                return await receive()
            played = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._keys or path in OPEN or path.startswith(OPEN_UNDER) or scope["method"] == "OPTIONS":
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1", "replace")
        right = [hmac.compare_digest(known, key) for known in self._keys]  # all of them, whichever is right
        if scheme.lower() != "bearer" or not any(right):
            message = "the API key is missing or wrong; send one as Authorization: Bearer KEY"
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """None where the client left."""
        most = self.settings.max_body
        refusal = ApiError(413, f"the request is larger than {most} bytes; send less")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length[:20]) > most:
            raise refusal
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise refusal
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time; send it faster") from None
