"""A crowd of clients in a process of its own: `python -m sparsekv.server.load.clients`, a plan as JSON on stdin, what
each request met as JSON on stdout. Plain sockets, so that the clients cost little of the machine that they measure.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """requests: of `prompt` random token ids each, answered by `output` tokens, each drawn between two numbers."""

    port: int
    model: str
    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    vocabulary: int
    rate: float | None = None
    """Requests a second, at random moments (a Poisson process); None = all at once."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Met:
    """One request's answer; seconds since the first was sent."""

    status: int
    sent: float
    moments: list[float]
    """When text came."""
    tokens: int
    """That the server counted."""


async def crowd(plan: Plan) -> list[Met]:
    """Send them all and wait for all."""
    draw, begun, tasks = random.Random(plan.seed), time.perf_counter(), []
    for _ in range(plan.requests):
        ids = [draw.randrange(plan.vocabulary) for _ in range(draw.randint(*plan.prompt))]
        body = {
            "model": plan.model,
            "prompt": ids,
            "max_tokens": draw.randint(*plan.output),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        tasks.append(asyncio.create_task(_ask(plan.port, json.dumps(body).encode(), begun)))
        if plan.rate is not None:
            await asyncio.sleep(draw.expovariate(plan.rate))
    return await asyncio.gather(*tasks)


async def _ask(port: int, body: bytes, begun: float) -> Met:
    sent = time.perf_counter() - begun
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    status = int((await reader.readline()).split()[1])
    moments, tokens = list[float](), 0
    async for line in reader:
        if line.startswith(b"data: {"):
            piece: dict[str, Any] = json.loads(line[6:])
            if piece.get("usage"):
                tokens = piece["usage"]["completion_tokens"]
            elif piece.get("choices"):
                moments.append(time.perf_counter() - begun)
    writer.close()
    return Met(status=status, sent=sent, moments=moments, tokens=tokens)


if __name__ == "__main__":
    given = json.load(sys.stdin)
    given |= {name: tuple(given[name]) for name in ("prompt", "output")}
    json.dump([asdict(met) for met in asyncio.run(crowd(Plan(**given)))], sys.stdout)
