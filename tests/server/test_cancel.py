"""A request ends with its client, or with its deadline; its pages are free at once."""

import asyncio
import json
import socket
import time
from typing import Any

import openai
import pytest

from http_serving import Running, wait_for
from serving import assert_empty

MESSAGES: list[Any] = [{"role": "user", "content": "the river"}]
LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": MESSAGES,
    "max_tokens": 2000,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


def idle(running: Running) -> bool:
    return running.service.samples == 0 and not running.llm.engine.requests


def test_closing_a_stream_aborts(running: Running) -> None:
    stream = running.client().chat.completions.create(**LONG, n=2, stream=True)
    assert next(stream).choices
    assert running.service.samples == 2
    stream.close()
    wait_for(lambda: idle(running))
    assert_empty(running.llm)


def test_a_client_that_gives_up_aborts(running: Running) -> None:
    with pytest.raises(openai.APITimeoutError):
        running.client(timeout=0.3).chat.completions.create(**LONG)
    wait_for(lambda: idle(running))
    assert_empty(running.llm)


def test_a_cancelled_task_aborts(running: Running) -> None:
    async def cancel() -> None:
        client = running.async_client()
        task = asyncio.create_task(client.chat.completions.create(**LONG))
        while running.service.samples == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()

    asyncio.run(cancel())
    wait_for(lambda: idle(running))


def test_a_reader_that_takes_nothing_meets_its_deadline(running: Running) -> None:
    body = json.dumps(
        {"model": "tiny", "prompt": "the", "n": 8, "max_tokens": 2000, "stream": True, "logprobs": 20, "deadline": 2.0}
        | {"ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_for(lambda: running.service.samples == 8)
        wait_for(lambda: idle(running), 15)
    assert_empty(running.llm)


def test_a_deadline_ends_a_request(running: Running) -> None:
    begun = time.monotonic()
    with pytest.raises(openai.APIStatusError) as caught:
        running.client().chat.completions.create(**LONG | {"extra_body": {"ignore_eos": True, "deadline": 0.3}})
    assert caught.value.status_code == 408
    assert caught.value.code == "deadline_exceeded"
    assert time.monotonic() - begun < 5
    wait_for(lambda: idle(running))
    stream = running.client().chat.completions.create(
        **LONG | {"extra_body": {"ignore_eos": True, "deadline": 0.5}}, stream=True
    )
    with pytest.raises(openai.APIError, match="deadline"):
        list(stream)
    wait_for(lambda: idle(running))
    assert_empty(running.llm)
