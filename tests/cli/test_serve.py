"""`sparsekv serve` as a process: SIGTERM under load, what it refuses, what the embedded model answers."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from commands import save_model
from sparsekv.cli.models import find_adapter

SECONDS = 120


@contextmanager
def process(*arguments: Any) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """The command, ready on a free port, and a client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sparsekv.cli.main", "serve", *map(str, arguments), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        try:
            until = time.monotonic() + SECONDS
            while not _ready(port):
                assert run.poll() is None, run.stderr and run.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.1)
            url = f"http://127.0.0.1:{port}/v1"
            yield run, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS)
        finally:
            run.kill()


def _ready(port: int) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).status == 200
    return False


def test_what_is_refused(run, model_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# none\n")
    for arguments, says in (
        (("--cr", 4), "needs a method"),
        (("--port", 99999), "port is 99999"),
        (("--api-keys", keys), "holds no key"),
        (("--api-keys", tmp_path / "none"), "No such file"),
        (("--scorer", "http://localhost/x"), "both --scorer and --scorer-model"),
        (("--adaptive-cr", "4:8"), "turns an adapter"),
        (("--adapter", adapter_folder, "--adaptive-cr", "8:4"), "adaptive-cr is '8:4'"),
        (("--max-body", "much"), "'much' is not a size"),
        (("--deadline", 0), "deadline is 0.0"),
        (("--adapter", adapter_folder, "--cr", 99), "compression ratio is 99"),
    ):
        outcome = run("serve", model_folder, *arguments)
        assert outcome.code == 2
        assert says in outcome.err


def test_weights_that_may_run_code_are_refused(run, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    outcome = run("serve", folder)
    assert outcome.code == 2
    assert "cannot load" in outcome.err


@pytest.mark.slow
def test_the_embedded_model_answers_and_a_term_signal_lets_it_finish() -> None:
    adapter = find_adapter("smollm2-135m")
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    arguments = ("smollm2-135m", "--adapter", adapter, "--cr", 4, "--kv-memory", "512MiB")
    with process(*arguments) as (run, client), ThreadPoolExecutor() as pool:
        options: dict[str, Any] = {"model": "smollm2-135m", "messages": messages, "temperature": 0, "max_tokens": 10}
        reply = client.chat.completions.create(**options)
        assert "Paris" in str(reply.choices[0].message.content)
        chunks = client.chat.completions.create(**options, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == reply.choices[0].message.content
        options |= {"n": 4, "temperature": 0.7, "logprobs": True, "top_logprobs": 2}
        samples = client.chat.completions.create(**options)
        assert len(samples.choices) == 4
        assert all(len(c.logprobs.content[0].top_logprobs) == 2 for c in samples.choices if c.logprobs)
        tools: Any = [{"type": "function", "function": {"name": "f"}}]
        with pytest.raises(openai.BadRequestError, match="knows no tools"):
            client.chat.completions.create(**options, tools=tools)

        options = {"model": "smollm2-135m", "messages": messages, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
        asked = [pool.submit(client.chat.completions.create, **options) for _ in range(3)]
        while not _running(client, 3):
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        assert [task.result().usage.completion_tokens for task in asked] == [24] * 3
        assert run.wait(20) == 0


def _running(client: openai.OpenAI, samples: int) -> bool:
    url = str(client.base_url).replace("/v1/", "/metrics")
    text = urllib.request.urlopen(url, timeout=5).read().decode()
    return f'num_requests_running{{model_name="smollm2-135m"}} {samples}.0' in text
