"""The progress bar of generate: requests done, and tokens per second."""

import sys
import time
from typing import Self

from tqdm.auto import tqdm

from sparsekv.engine.schedule.request import Request


class Progress:
    """A bar over `total` requests. show: True, False, or None = for several on a terminal."""

    def __init__(self, total: int, *, show: bool | None) -> None:
        if show is None:
            show = total > 1 and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc="requests", unit="request", dynamic_ncols=True) if show else None
        self._start = time.perf_counter()
        self._read = self._written = 0

    def update(self, request: Request) -> None:
        """One is finished."""
        if self._bar is None:
            return
        self._read += len(request.prompt)
        self._written += sum(len(sequence.tokens) - len(request.prompt) for sequence in request.sequences)
        seconds = max(time.perf_counter() - self._start, 1e-9)
        speeds = f"{self._read / seconds:.0f} tokens/s in, {self._written / seconds:.0f} tokens/s out"
        self._bar.set_postfix_str(speeds, refresh=False)
        self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
