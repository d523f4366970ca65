"""What is refused, and how: a 4xx in OpenAI's shape whose sentence does not repeat what was sent."""

import json
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest

from http_serving import Running

USER = [{"role": "user", "content": "the river"}]
SECRET = "lighthouse-12345"


def post(running: Running, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(running.url + path, data, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": SECRET, "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"colour": SECRET}, "colour"),
    ({"n": 0}, "n:"),
    ({"n": "2"}, "n:"),
    ({"n": 129}, "129 samples"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "differ"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"top_logprobs": 2}, "top_logprobs needs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stop": ""}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"messages": [{"role": "user", "content": "half \ud800"}]}, "surrogate"),
    ({"messages": [{"role": "user", "content": "river " * 3000}]}, "the context is 2048"),
    ({"vote": {"answer": "boxed"}}, "set n to 2"),
    ({"vote": {"by": "scorer"}, "n": 2}, "no scorer"),
    ({"max_thinking_tokens": 4}, "end markers"),
    ({"deadline": 0}, "deadline"),
]


@pytest.mark.parametrize(("change", "says"), CHATS, ids=[says for _, says in CHATS])
def test_a_bad_chat_is_refused(running: Running, change: dict[str, Any], says: str) -> None:
    status, reply = post(running, "/v1/chat/completions", {"model": "tiny", "messages": USER, "max_tokens": 4} | change)
    assert status == 400
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["type"] == "invalid_request_error"
    assert says in reply["error"]["message"]
    assert SECRET not in json.dumps(reply)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"],
    ids=["empty", "half", "list", "null", "bytes", "deep", "long number"],
)
def test_what_is_no_request_is_refused(running: Running, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        status, reply = post(running, path, body)
        assert status == 400
        assert reply["error"]["message"]


def test_the_client_s_exceptions(running: Running) -> None:
    client = running.client()
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.chat.completions.create(model="other", messages=USER)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="")
    assert caught.value.code == "invalid_request"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 3000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="tiny", prompt=[512])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert client.models.retrieve("tiny").id == "tiny"


def test_paths_and_methods(running: Running) -> None:
    assert post(running, "/v1/embeddings", {})[0] == 404
    status, reply = post(running, "/health", {})
    assert status == 405
    assert reply["error"]["code"] == "method_not_allowed"


def test_tokens(running: Running) -> None:
    text = "the old ship 🙂"
    ids = running.llm.tokenizer.encode(text)
    status, reply = post(running, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (ids, len(ids), 2048)
    assert len(reply["token_strs"]) == len(ids)
    assert post(running, "/detokenize", {"tokens": ids}) == (200, {"prompt": text})
    chat = post(running, "/tokenize", {"messages": USER})[1]
    assert chat["tokens"] == running.llm.chat_prompt(USER)
    assert post(running, "/tokenize", {"prompt": "x", "messages": USER})[0] == 400
    assert post(running, "/detokenize", {"tokens": [512]})[0] == 400
