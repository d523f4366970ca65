"""What an operator decides."""

from dataclasses import dataclass
from pathlib import Path

from sparsekv.engine.checks import check_int, check_number
from sparsekv.scaling.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Raises ValueError, one sentence that names the field, for values out of range."""

    name: str
    """What clients call the model."""
    api_keys: tuple[str, ...] = ()
    """One of them must come with each request; none = open to all who reach the port."""
    max_body: int = 4 * 2**20
    """Bytes of a request."""
    max_waiting: int = 256
    """Samples that may wait for a row; a request of n samples counts n."""
    max_samples: int = 128
    """Samples of one request: prompts times n."""
    deadline: float = 600.0
    """Seconds that a request may take, its wait included."""
    drain: float = 60.0
    """Seconds that running requests have left after SIGTERM."""
    body_timeout: float = 30.0
    """Seconds that a client may take to send a request."""
    prefix_cache: int = 512 * 2**20
    """Bytes of host memory for chats that may go on; 0 = none are kept."""
    log_prompts: bool = False
    """Write prompts and answers into the log."""
    cors: tuple[str, ...] = ()
    """Origins of pages that may call from a browser."""
    thinking_end: str | None = None
    """What the model writes between thought and answer; None = what its tokenizer knows."""
    scorer: Scorer | None = None
    """Ranks chains where a request asks for it."""

    def __post_init__(self) -> None:
        for name in ("max_body", "max_samples"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("max_waiting", "prefix_cache"):
            check_int(name, getattr(self, name), at_least=0)
        for name in ("deadline", "body_timeout"):
            check_number(name, getattr(self, name), low=0.001)
        check_number("drain", self.drain, low=0.0)


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys from a file: one a line, blank lines and lines that begin with # left out.

    Raises ValueError where there is none, or one that no header can carry.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; write one key a line") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path} holds no key; write one a line, or leave the option out")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ValueError(f"{path} holds a key with spaces or letters that no header carries; use ASCII without spaces")
    return keys
