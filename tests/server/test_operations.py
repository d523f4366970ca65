"""What an operator relies on: keys, limits, the queue's bound, the drain, a dead engine, CORS."""

import concurrent.futures
import json
import signal
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from http_serving import Running, serving, tiny_llm, wait_for
from serving import assert_empty
from sparsekv.server.settings import ServerSettings, read_keys

MESSAGES: list[Any] = [{"role": "user", "content": "the river"}]


def get(running: Running, path: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(running.url + path, headers=headers), timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ask(running: Running, *, tokens: int = 4, key: str = "none", **options: Any) -> Any:
    client = running.client(api_key=key)
    options = {"extra_body": {"ignore_eos": True}, "temperature": 0} | options
    return client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=tokens, **options)


def test_health_readiness_and_version(running: Running) -> None:
    assert json.loads(get(running, "/health")[1]) == {"alive": True}
    assert json.loads(get(running, "/ready")[1]) == {"ready": True}
    assert "version" in json.loads(get(running, "/version")[1])


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key\n\nsecond-key \n")
    keys = read_keys(file)
    assert keys == ("first-key", "second-key")
    with serving(tiny_llm(), api_keys=keys) as server:
        for key in keys:
            assert ask(server, key=key).choices
        for key in ("first-kez", "first-key2", "", "# ours", "first-key,second-key"):
            with pytest.raises((openai.AuthenticationError, openai.OpenAIError)):
                ask(server, key=key or "x")
        for path in ("/v1/models", "/openapi.json"):
            status, reply = get(server, path)
            assert status == 401
            assert json.loads(reply)["error"]["code"] == "invalid_api_key"
        assert get(server, "/v1/models", Authorization="Bearer second-key")[0] == 200
        assert get(server, "/v1/models", Authorization="Basic second-key")[0] == 401
        assert [get(server, path)[0] for path in ("/health", "/ready", "/metrics", "/version")] == [200] * 4
    for text in ("", "# nothing\n", "a key\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="key"):
            read_keys(file)


def test_bodies_too_large_or_too_slow() -> None:
    with serving(tiny_llm(), max_body=2000, body_timeout=0.3) as server:
        assert ask(server).choices
        with pytest.raises(openai.APIStatusError) as caught:
            server.client().completions.create(model="tiny", prompt="x" * 3000)
        assert caught.value.status_code == 413
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
        for sent, status in (
            (
                b"Transfer-Encoding: chunked\r\n\r\n"
                + b"400\r\n"
                + b"x" * 1024
                + b"\r\n400\r\n"
                + b"x" * 1024
                + b"\r\n",
                413,
            ),
            (b"Content-Length: 100\r\n\r\n{", 408),
        ):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
                client.sendall(head + sent)
                assert client.recv(4096).startswith(f"HTTP/1.1 {status}".encode())
        assert ask(server).choices


def test_the_queue_counts_samples() -> None:
    llm = tiny_llm(max_num_seqs=2)
    with serving(llm, max_waiting=3, max_samples=5) as server:
        stream = ask(server, tokens=2000, n=4, temperature=1.0, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(server, n=2)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.code == "queue_full"
        with pytest.raises(openai.BadRequestError, match="6 samples"):
            ask(server, n=6)
        stream.close()
        wait_for(lambda: server.service.samples == 0)
        assert len(ask(server, n=5).choices) == 5
        assert 'request_refused_total{model_name="tiny",reason="queue_full"} 1.0' in get(server, "/metrics")[1]
    assert_empty(llm)


def test_a_drain_lets_requests_finish() -> None:
    llm = tiny_llm()
    with serving(llm) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        running = [pool.submit(ask, server, tokens=150) for _ in range(4)]
        wait_for(lambda: server.service.samples == 4)
        server.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(server)
        assert caught.value.status_code == 503
        assert caught.value.code == "draining"
        assert get(server, "/ready")[0] == 503
        assert get(server, "/health")[0] == 200
        assert [task.result().usage.completion_tokens for task in running] == [150] * 4
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert_empty(llm)


def test_a_drain_is_over_in_time() -> None:
    llm = tiny_llm()
    with serving(llm, drain=0.2) as server:
        stream = ask(server, tokens=2000, stream=True)
        next(stream)
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(10)
        assert not server.thread.is_alive()
    wait_for(lambda: not llm.engine.requests)
    assert_empty(llm)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_shows() -> None:
    llm = tiny_llm()
    with serving(llm) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, server, tokens=2000)
        wait_for(lambda: server.service.samples == 1)

        def die() -> None:
            raise SystemError("the thread goes")

        llm._streams._jobs.put(die)
        wait_for(lambda: get(server, "/health")[0] == 503, 5)
        assert get(server, "/ready")[0] == 503
        assert 'engine_alive{model_name="tiny"} 0.0' in get(server, "/metrics")[1]
        assert isinstance(waiting.exception(10), openai.APIStatusError)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(server)
        assert (caught.value.status_code, caught.value.code) == (503, "engine_dead")


def test_a_failed_step_ends_requests_and_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm()
    with serving(llm) as server:
        step = llm.engine.runner.execute
        failed = threading.Event()

        def fail(*arguments: Any) -> Any:
            if not failed.is_set():
                failed.set()
                raise RuntimeError("secret of the prompt")
            return step(*arguments)

        monkeypatch.setattr(llm.engine.runner, "execute", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(server)
        assert caught.value.status_code == 500
        assert "secret" not in str(caught.value)
        assert ask(server).choices
        assert get(server, "/health")[0] == 200


def test_other_origins_are_let_in_by_name_alone(running: Running) -> None:
    def allowed(server: Running) -> str | None:
        request = urllib.request.Request(server.url + "/version", headers={"Origin": "https://page.example"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.headers.get("access-control-allow-origin")

    assert allowed(running) is None
    with serving(tiny_llm(), cors=("https://page.example",)) as server:
        assert allowed(server) == "https://page.example"


@pytest.mark.parametrize(
    "wrong", [{"max_body": 0}, {"max_waiting": -1}, {"deadline": 0.0}, {"drain": -1.0}, {"max_samples": "4"}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerSettings(name="tiny", **wrong)
