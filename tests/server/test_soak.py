"""Many clients at once over a pool too small for them: some leave, read slowly, send rubbish or a wrong key. Each
answer is that of the request alone, no page is left behind and no request's state, nobody hangs."""

import asyncio
import gc
import json
import random
from collections import Counter
from functools import cache
from typing import Any

import openai

from http_serving import Running, serving, tiny_llm, wait_for
from serving import alone, assert_empty
from sparsekv import LLM, SamplingParams

PROMPTS = ("the river", "a ship sails under the green light and slowly turns", "old", "mountain and river " * 12)
NEW = 20
KEY = "right-key"
CLIENTS = 64
ACTIONS = ("ask", "ask", "ask", "stream", "slow", "leave", "many", "key", "rubbish", "oversize")


@cache
def reference() -> LLM:
    return tiny_llm()


@cache
def expected(which: int, samples: int) -> list[str]:
    """Of the request alone: one by plain Transformers, several from an engine that runs nothing else."""
    llm = reference()
    if samples == 1:
        ids = llm.tokenizer.encode(PROMPTS[which])
        return [llm.tokenizer.decode(alone(llm.model, ids, NEW))]
    params = SamplingParams(n=samples, max_tokens=NEW, temperature=0.9, seed=5, ignore_eos=True)
    (output,) = llm.generate(PROMPTS[which], params)
    return [c.text for c in output.outputs]


class Client:
    """Does some things in turn, drawn from a seed; `did` counts how they ended."""

    def __init__(self, server: Running, seed: int, did: Counter[str]) -> None:
        self.server, self.rng, self.did = server, random.Random(seed), did
        self.client = server.async_client(api_key=KEY, timeout=60)

    async def run(self, actions: int) -> None:
        for _ in range(actions):
            name = self.rng.choice(ACTIONS)
            self.did[await getattr(self, name)()] += 1
        await self.client.close()

    def options(self, which: int, samples: int) -> dict[str, Any]:
        given: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[which], "max_tokens": NEW, "n": samples}
        given |= {"temperature": 0.9, "seed": 5} if samples > 1 else {"temperature": 0}
        return given | {"extra_body": {"ignore_eos": True}}

    async def ask(self, samples: int = 1) -> str:
        which = self.rng.randrange(len(PROMPTS))
        try:
            reply = await self.client.completions.create(**self.options(which, samples))
        except openai.RateLimitError:
            return "queue full"
        assert [c.text for c in reply.choices] == expected(which, samples)
        return "answered"

    async def many(self) -> str:
        return await self.ask(16)

    async def stream(self, pause: float = 0.0) -> str:
        which, samples = self.rng.randrange(len(PROMPTS)), self.rng.choice([1, 16])
        texts = [""] * samples
        try:
            stream = await self.client.completions.create(**self.options(which, samples), stream=True)
        except openai.RateLimitError:
            return "queue full"
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
            await asyncio.sleep(pause)
        assert texts == expected(which, samples)
        return "streamed"

    async def slow(self) -> str:
        return await self.stream(pause=0.01)

    async def leave(self) -> str:
        task = asyncio.create_task(self.stream() if self.rng.random() < 0.5 else self.ask())
        await asyncio.sleep(self.rng.random() * 0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "left"

    async def key(self) -> str:
        async with self.server.async_client(api_key="wrong") as other:
            try:
                await other.models.list()
            except openai.AuthenticationError:
                return "wrong key"
        raise AssertionError("a wrong key was let in")

    async def rubbish(self) -> str:
        body = self.rng.choice([b"{", b"\x00" * 50, b"[1, 2]", json.dumps({"model": "tiny", "n": -3}).encode()])
        return await self._raw(body, len(body), "400")

    async def oversize(self) -> str:
        return await self._raw(b"x" * 100, 10**9, "413")

    async def _raw(self, body: bytes, length: int, status: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {length}\r\n"
        )
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        line = (await reader.readline()).decode()
        writer.close()
        assert status in line
        return status


async def crowd(server: Running, *, clients: int, actions: int, seed: int) -> Counter[str]:
    did: Counter[str] = Counter()
    async with asyncio.timeout(300):
        async with asyncio.TaskGroup() as group:
            for i in range(clients):
                group.create_task(Client(server, seed * 1000 + i, did).run(actions))
    return did


def our_objects() -> Counter[str]:
    """How many there are, by class."""
    gc.collect()
    classes = (type(found) for found in gc.get_objects())
    return Counter(str(found) for found in classes if str(found.__module__).startswith("sparsekv"))


def test_a_crowd() -> None:
    for which in range(len(PROMPTS)):
        for samples in (1, 16):
            expected(which, samples)
    llm = tiny_llm(pages=90)
    with serving(llm, max_waiting=200, max_body=100_000, api_keys=(KEY,)) as server:
        did = asyncio.run(crowd(server, clients=CLIENTS, actions=1, seed=1))
        wait_for(lambda: server.service.samples == 0 and not llm.engine.requests)
        kept = our_objects()
        asyncio.run(crowd(server, clients=CLIENTS // 4, actions=1, seed=2))
        wait_for(lambda: server.service.samples == 0 and not llm.engine.requests)
        assert our_objects() == kept
        assert llm.engine.preemptions > 0
        assert did["answered"] >= 5
        assert did.total() == CLIENTS
        assert server.service.busy == 0
    assert_empty(llm)
