"""Running the application: uvicorn, and an end that lets requests finish.

The first SIGTERM or SIGINT drains: what runs goes on, what comes gets 503, and the server ends when nothing runs or
its time is over. The second ends it now.
"""

import time
from types import FrameType

import uvicorn

from sparsekv.server.app import make_app
from sparsekv.server.service import Service

KEEP_ALIVE = 5
CLOSING = 3
"""Seconds for connections to close."""


class DrainingServer(uvicorn.Server):
    """uvicorn's, over a service."""

    def __init__(self, service: Service, *, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=CLOSING,
            )
        )
        self.service = service
        self._until = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.should_exit = True
            return
        self._until = time.monotonic() + self.service.settings.drain
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and (self.service.busy == 0 or time.monotonic() > self._until):
            self.should_exit = True
        return await super().on_tick(counter)
