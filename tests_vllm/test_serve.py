"""vLLM's server with the plugin, driven by OpenAI's own client: chat, streams, samples, cancellation, and clients at
once over a pool that is too small."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from sparsekv.integrations.vllm import engine_args, serve_arguments

CLIENTS, TOKENS = 32, 40


@pytest.fixture(scope="module")
def client(made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of a server with little more than one whole sequence of pages."""
    llama = made("Llama")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = serve_arguments(engine_args(llama.model, adapter=llama.adapter) | {"max_num_batched_tokens": 256})
    own = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "6", "--num-gpu-blocks-override", "10"]
    own += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    # What `vllm serve` runs: that command looks for a package named vllm, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words, *own]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as server:
        found = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            wait_for(found, server, log)
            yield found
        finally:
            server.terminate()
            server.wait(60)


def wait_for(client: Any, server: Any, log: Path, seconds: float = 600) -> None:
    """Until it answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text()[-4000:])


def complete(client: Any, prompt: list[int], **options: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
    return client.completions.create(model="tiny", prompt=prompt, **(settings | options))


def value_of(metrics: str, name: str) -> float:
    """As Prometheus reads it."""
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"vllm:{name}{{")]
    return float(line.split()[-1])


def token_ids(completion: Any) -> list[list[int]]:
    return [choice.token_ids for choice in completion.choices]


def test_answers_equal_ours(client, made):
    llama = made("Llama")
    want = [list(output.outputs[0].token_ids) for output in llama.answers(max_tokens=TOKENS)]
    assert [token_ids(complete(client, prompt))[0] for prompt in llama.prompts] == want


def test_clients_at_once_get_what_each_gets_alone(client, made):
    """Some go away in the middle of their answers."""
    prompts = made("Llama").prompts * 4
    alone = [token_ids(complete(client, prompt)) for prompt in made("Llama").prompts] * 4

    def one(index: int) -> Any:
        if index % 5 == 4:
            stream = complete(client, prompts[index], stream=True)
            next(iter(stream))
            stream.close()
            return None
        return token_ids(complete(client, prompts[index]))

    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(one, range(CLIENTS)))
    assert all(got in (None, want) for got, want in zip(together, alone, strict=True))
    assert len(together) == CLIENTS and sum(got is None for got in together) == CLIENTS // 5
    metrics = client.get("../metrics", cast_to=str)
    # All preemptions are for want of pages; whether there were any depends on who comes when.
    assert value_of(metrics, "sparsekv_preemptions_total") == value_of(metrics, "num_preemptions_total")
    assert value_of(metrics, "sparsekv_credits") <= 9


def test_chat_streams_and_samples(client):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "the old ship sails"}], "max_tokens": TOKENS}
    whole = client.chat.completions.create(**chat, temperature=0).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**chat, temperature=0, stream=True)
        if chunk.choices
    ]
    assert whole and len(pieces) > 1 and "".join(pieces) == whole
    samples = client.chat.completions.create(**chat, n=4, temperature=1, extra_body={"top_k": 1})
    assert [choice.message.content for choice in samples.choices] == [whole] * 4
