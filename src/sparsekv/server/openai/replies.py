"""Replies that end with the client: what makes one is cancelled when its client leaves or its deadline is over.

A stream's first piece is made before its status is sent, so that a refusal has a status of its own.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sparsekv.server.openai.errors import ApiError, as_api_error

DONE = "[DONE]"
LAST_WORD = 1.0
"""Seconds for telling a stream why it ends."""


def event(data: Any) -> bytes:
    """One server-sent event. DONE, or what JSON knows."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Reply(Response):
    """deadline: seconds; ended: hears the status, once, whatever the end; 499 where the client left."""

    def __init__(self, *, deadline: float, ended: Callable[[int], None]) -> None:
        super().__init__()
        self.deadline, self.ended = deadline, ended
        self.started = False

    async def make(self, send: Send) -> None:
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        work = asyncio.create_task(self._timed(send))
        status = 499
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                error = None if work.cancelled() else work.exception()
                status = 200 if error is None else await self._tell(error, scope, receive, send)
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
            self.ended(status)

    async def _timed(self, send: Send) -> None:
        try:
            async with asyncio.timeout(self.deadline):
                await self.make(send)
        except TimeoutError:
            message = f"the request took longer than its deadline of {self.deadline:g} s; ask for less or allow more"
            raise ApiError(408, message) from None

    async def _tell(self, error: BaseException, scope: Scope, receive: Receive, send: Send) -> int:
        told = as_api_error(error)
        if not self.started:
            await told.response()(scope, receive, send)
            return told.status
        try:
            async with asyncio.timeout(LAST_WORD):  # a reader that takes nothing is left
                body = event(told.body()) + event(DONE)
                await send({"type": "http.response.body", "body": body, "more_body": False})
        except TimeoutError:
            pass
        return told.status


class JSONReply(Reply):
    """content: makes what JSON knows."""

    def __init__(self, content: Callable[[], Awaitable[Any]], **options: Any) -> None:
        super().__init__(**options)
        self.content = content

    async def make(self, send: Send) -> None:
        body = json.dumps(await self.content(), ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.started = True
        await send({"type": "http.response.body", "body": body, "more_body": False})


class EventStream(Reply):
    """content: yields what JSON knows; DONE follows."""

    def __init__(self, content: AsyncGenerator[Any, None], **options: Any) -> None:
        super().__init__(**options)
        self.content = content

    async def make(self, send: Send) -> None:
        async with aclosing(self.content) as pieces:
            async for piece in pieces:
                await self._start(send)
                await send({"type": "http.response.body", "body": event(piece), "more_body": True})
        await self._start(send)
        await send({"type": "http.response.body", "body": event(DONE), "more_body": False})

    async def _start(self, send: Send) -> None:
        if not self.started:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            self.started = True


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
