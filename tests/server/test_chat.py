"""Chats by the official client: whole and streamed, samples, log-probabilities, tools; each as the request alone."""

import json
import math
from typing import Any

import pytest

from http_serving import Running, serving, tiny_llm
from serving import alone, assert_empty
from sparsekv import SamplingParams

MESSAGES: list[Any] = [{"role": "system", "content": "old ship"}, {"role": "user", "content": "the river turns"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "row", "parameters": {"type": "object"}}}]


def create(running: Running, **options: Any) -> Any:
    given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | options
    return running.client().chat.completions.create(**given)


def joined(chunks: list[Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts


def test_greedy_is_what_plain_transformers_say(running: Running) -> None:
    reply = create(running)
    ids = running.llm.chat_prompt(MESSAGES)
    expected = alone(running.llm.model, ids, 12)
    assert reply.choices[0].message.content == running.llm.tokenizer.decode(expected, skip_special_tokens=True)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 12)
    kv = reply.usage.kv
    assert kv["tokens_seen"] == len(ids) + 11
    assert kv["tokens_held"] < kv["tokens_seen"]
    assert kv["compression_ratio"] == pytest.approx(kv["tokens_seen"] / kv["tokens_held"])
    assert kv["kv_reads"] > 0


def test_samples_are_those_of_the_engine(running: Running) -> None:
    reply = create(running, n=4, temperature=0.9, top_p=0.95, seed=7, stop=["zq"])
    params = SamplingParams(n=4, temperature=0.9, top_p=0.95, seed=7, stop=["zq"], max_tokens=12)
    (expected,) = running.llm.chat(MESSAGES, params)
    assert [c.message.content for c in reply.choices] == [c.text for c in expected.outputs]
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    assert len({c.message.content for c in reply.choices}) > 1


def test_a_stream_says_the_same(running: Running) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 0.8, "seed": 3, "logprobs": True, "top_logprobs": 2}
    whole = create(running, **options)
    chunks = list(create(running, **options, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == {c.index: c.message.content for c in whole.choices}
    assert next(c.delta.role for chunk in chunks for c in chunk.choices) == "assistant"
    reasons = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert reasons == {c.index: c.finish_reason for c in whole.choices}
    for choice in whole.choices:
        streamed = [
            entry.logprob
            for chunk in chunks
            for c in chunk.choices
            if c.index == choice.index and c.logprobs
            for entry in c.logprobs.content
        ]
        assert streamed == [entry.logprob for entry in choice.logprobs.content]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.kv["tokens_held"] == whole.usage.kv["tokens_held"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_ends_with_done(running: Running) -> None:
    import urllib.request

    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{running.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.read().decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_logprobs(running: Running) -> None:
    reply = create(running, logprobs=True, top_logprobs=3, max_tokens=5)
    content = reply.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0]  # greedy
        assert sum(map(math.exp, values)) < 1
        assert bytes(entry.bytes).decode() == entry.token
    assert create(running, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_stop_and_limits(running: Running) -> None:
    text = create(running).choices[0].message.content
    stop = text[4]
    stopped = create(running, stop=stop).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(stop)]
    assert create(running, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    first = running.llm.tokenizer.encode("ship")[0]
    biased = create(running, logit_bias={str(first): 1000}, max_tokens=3).choices[0].message.content
    assert biased == running.llm.tokenizer.decode([first] * 3)


def test_parts_of_text_are_one_text(running: Running) -> None:
    parts = [{"type": "text", "text": "the river"}, {"type": "text", "text": " turns"}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}]
    assert create(running, messages=messages).choices[0].message.content == create(running).choices[0].message.content


def test_tools_go_through_the_template(running: Running) -> None:
    turns = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "row", "arguments": '{"n": 2}'}}],
        },
        {"role": "tool", "content": "done", "tool_call_id": "a"},
    ]
    reply = create(running, messages=turns, tools=TOOLS)
    prompt = '<|tool|>row<|system|>old ship<|end|><|user|>the river turns<|end|><|assistant|>(row {"n": 2})<|end|>'
    prompt += "<|tool|>done<|end|><|assistant|>"
    ids = running.llm.tokenizer.encode(prompt, add_special_tokens=False)
    assert reply.usage.prompt_tokens == len(ids)
    expected = running.llm.tokenizer.decode(alone(running.llm.model, ids, 12), skip_special_tokens=True)
    assert reply.choices[0].message.content == expected
    without = create(running, tools=TOOLS, tool_choice="none")
    assert without.usage.prompt_tokens == create(running).usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_comes_as_one(stream: bool) -> None:
    """The text of a call is forced as the end marker of a thought of no tokens; the end of text follows it."""
    called = '<tool_call>\n{"name": "row", "arguments": {"to": "the old ship"}}\n</tool_call>'
    llm = tiny_llm()
    options: dict[str, Any] = {
        "tools": TOOLS,
        "max_tokens": 200,
        "logit_bias": {str(llm.tokenizer.eos_token_id): 1e4},
        "extra_body": {"max_thinking_tokens": 0},
    }
    with serving(llm, thinking_end=called) as server:
        if stream:
            chunks = list(create(server, **options, stream=True))
            assert joined(chunks) == {0: ""}
            (call,) = [c for chunk in chunks for choice in chunk.choices for c in choice.delta.tool_calls or []]
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = create(server, **options).choices[0]
            assert choice.message.content is None
            (call,), reason = choice.message.tool_calls, choice.finish_reason
        assert call.function.name == "row"
        assert json.loads(call.function.arguments) == {"to": "the old ship"}
        assert reason == "tool_calls"
    assert_empty(llm)
