"""One line of JSON for each request: what it was, how it ended, how long it took. No prompt text, unless asked."""

import json
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from sparsekv.server.service import Service

log = logging.getLogger("sparsekv.server.openai.requests")
QUIET = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Paths that are asked for all the time; their lines come at level debug."""
_STANDARD = set(vars(logging.makeLogRecord({})))


class Logged:
    """ASGI: the scope gets `note`, by which a route adds to its line."""

    def __init__(self, app: ASGIApp, *, service: "Service") -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, facts = time.monotonic(), dict[str, Any](status=499)
        scope["note"] = facts.update
        asks = scope["method"] == "POST"
        self.service.busy += asks

        async def noticed(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noticed)
        finally:
            self.service.busy -= asks
            self.service.metrics.answered(facts["status"])
            route = getattr(scope.get("route"), "path", "other")  # a path may hold anything
            line = {"method": scope["method"], "path": route, "seconds": round(time.monotonic() - begun, 4)} | facts
            log.log(logging.DEBUG if scope["path"] in QUIET else logging.INFO, "request", extra=line)


class JSONFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, and what the record has beside."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            kind = record.exc_info[0]
            line["error"] = None if kind is None else kind.__name__  # its text may hold a prompt
        return json.dumps(line, default=str)


def configure(level: int = logging.INFO) -> None:
    """Send the server's lines, and uvicorn's, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    for name in ("sparsekv", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "sparsekv" else logging.WARNING)
