"""A server of the tiny model on a free port of loopback, in a thread, and the official client."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

import tiny
from serving import attached, engine
from sparsekv import LLM
from sparsekv.server.operate.dial import Dial
from sparsekv.server.run import DrainingServer
from sparsekv.server.service import Service
from sparsekv.server.settings import ServerSettings

CHAT = (
    "{% for t in tools or [] %}<|tool|>{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SECONDS = 30.0


class Running:
    """A server under way."""

    def __init__(self, llm: LLM, server: DrainingServer, thread: threading.Thread) -> None:
        self.llm, self.server, self.thread = llm, server, thread
        self.service = server.service
        self.port: int = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **_client(options))

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **_client(options))


def _client(options: dict[str, Any]) -> dict[str, Any]:
    return {"api_key": "none", "max_retries": 0, "timeout": SECONDS} | options


def tiny_llm(policy: str = "dms", **options: Any) -> LLM:
    """float64, so that batches and chunks change nothing; its tokenizer's template knows tools."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64} | options
    return engine(attached(policy, vocab_size=512, max_position_embeddings=2048), tokenizer=tokenizer, **options)


@contextmanager
def serving(llm: LLM, *, dial: Dial | None = None, **settings: Any) -> Iterator[Running]:
    """Within, the server runs."""
    service = Service(llm, ServerSettings(**{"name": "tiny"} | settings), dial=dial)
    server = DrainingServer(service, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Running(llm, server, thread)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
