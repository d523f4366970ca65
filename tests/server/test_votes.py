"""Budgets of thought and votes over HTTP. What a sample says is forced: an end marker is text of our choice."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import openai
import pytest

from http_serving import Running, serving, tiny_llm
from serving import assert_empty
from sparsekv import LLM
from sparsekv.scaling.scorer import Scorer

END = "<|end|>"


def ids(llm: LLM, *texts: str) -> list[int]:
    found = [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert all(len(each) == 1 for each in found)
    return [each[0] for each in found]


def ask(server: Running, among: tuple[str, ...], **options: Any) -> Any:
    """Samples whose tokens are drawn from `among`, beside what is forced."""
    extra = {name: options.pop(name) for name in ("vote", "max_thinking_tokens") if name in options}
    bias = {str(token): 1000 for token in ids(server.llm, *among)}
    given: dict[str, Any] = {"model": "tiny", "prompt": "the river", "max_tokens": 200, "logit_bias": bias}
    return server.client().completions.create(**given | options, extra_body=extra)


@pytest.fixture(scope="module")
def voting() -> Iterator[Running]:
    """Each thought ends with the end of text."""
    with serving(tiny_llm(), thinking_end=END) as server:
        yield server
        assert_empty(server.llm)


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_thought_ends_within_its_budget(kind: str) -> None:
    marker = "slowly turns"
    with serving(tiny_llm(), thinking_end=marker) as server:
        end = server.llm.tokenizer.encode(marker, add_special_tokens=False)
        extra = {"max_thinking_tokens": 6, "ignore_eos": True}
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "seed": 3, "n": 3, "extra_body": extra}
        client = server.client()
        if kind == "chat":
            messages: Any = [{"role": "user", "content": "the river"}]
            chat = client.chat.completions.create(messages=messages, logprobs=True, **options)
            samples = [(c.message.content, [e.token for e in c.logprobs.content]) for c in chat.choices]
        else:
            completion = client.completions.create(prompt="the river", logprobs=0, **options)
            samples = [(c.text, c.logprobs.tokens) for c in completion.choices]
        forced = [server.llm.tokenizer.decode([token]) for token in end]
        for text, tokens in samples:
            assert marker in text
            assert tokens[6 : 6 + len(end)] == forced
            assert len(tokens) == 20
        least = 6 + len(end) + 1
        assert client.completions.create(prompt="a", **options | {"max_tokens": least}).usage.completion_tokens
        with pytest.raises(openai.BadRequestError, match="no room for an answer"):
            client.completions.create(prompt="a", **options | {"max_tokens": least - 1})


def test_a_majority(voting: Running) -> None:
    reply = ask(voting, ("1", "2"), n=7, seed=1, max_thinking_tokens=1, vote={"answer": "number", "early_stop": False})
    texts = [c.text for c in reply.choices]
    assert set(texts) == {"1", "2"}
    winner = max("12", key=texts.count)
    vote = reply.vote
    assert vote["answer"] == winner
    assert vote["index"] == texts.index(winner)
    assert vote["weights"] == {text: texts.count(text) for text in dict.fromkeys(texts)}
    assert (vote["voters"], vote["tied"], vote["stopped_early"]) == (7, [], 0)


def test_a_tie_and_no_consensus_are_told(voting: Running) -> None:
    seeds = (ask(voting, ("1", "2"), n=2, seed=s, max_thinking_tokens=1, vote={"answer": "text"}) for s in range(20))
    tie = next(reply for reply in seeds if reply.choices[0].text != reply.choices[1].text)
    assert tie.vote["tied"] == [c.text for c in tie.choices]
    assert tie.vote["answer"] == tie.choices[0].text  # the first of them
    none = ask(voting, ("1", "2"), n=3, seed=1, max_thinking_tokens=1, vote={})
    assert (none.vote["answer"], none.vote["index"], none.vote["voters"]) == (None, None, 0)
    cut = ask(voting, ("1",), n=2, max_tokens=2, vote={"answer": "number"})  # no end: no answer
    assert cut.vote["answer"] is None
    with pytest.raises(openai.BadRequestError, match="one prompt"):
        ask(voting, ("1",), n=2, prompt=["a", "b"], vote={})


@pytest.mark.parametrize("stream", [False, True])
def test_a_decided_vote_stops_the_others(stream: bool) -> None:
    """Each sample says 7, then as many spaces as come before its end; five of eight decide."""
    llm = tiny_llm()
    with serving(llm, thinking_end="7") as server:
        options: dict[str, Any] = {"n": 8, "seed": 4, "max_thinking_tokens": 0, "max_tokens": 60}
        reply = ask(server, (" ", END), vote={"answer": "number"}, stream=stream, **options)
        if stream:
            chunks = list(reply)
            (vote,) = [chunk.vote for chunk in chunks if getattr(chunk, "vote", None)]
            reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
        else:
            vote, reasons = reply.vote, [c.finish_reason for c in reply.choices]
        whole = ask(server, (" ", END), vote={"answer": "number", "early_stop": False}, **options)
        assert vote["answer"] == whole.vote["answer"] == "7"
        assert vote["stopped_early"] == reasons.count("abort") > 0
        assert vote["voters"] >= 5
        assert [c.finish_reason for c in whole.choices] == ["stop"] * 8
        assert (whole.vote["voters"], whole.vote["stopped_early"]) == (8, 0)
    assert_empty(llm)


class _Scores(BaseHTTPRequestHandler):
    """A step's score is the number that the chain says."""

    problems: list[str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user, assistant = body["messages"]
        self.problems.append(user["content"])
        reply = json.dumps({"data": [{"data": [float(assistant["content"])]}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_scorer_ranks_instead() -> None:
    _Scores.problems = []
    http = HTTPServer(("127.0.0.1", 0), _Scores)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    scorer = Scorer(url=f"http://127.0.0.1:{http.server_port}/pooling", model="prm", tries=1)
    with serving(tiny_llm(), thinking_end=END, scorer=scorer) as server:
        options: dict[str, Any] = {"n": 6, "seed": 1, "max_thinking_tokens": 1}
        vote = {"by": "scorer", "answer": "number"}
        reply = ask(server, ("1", "2", "5"), vote=vote, **options)
        texts = [c.text for c in reply.choices]
        assert reply.vote["answer"] == max(texts)
        assert reply.vote["index"] == texts.index(max(texts))
        assert reply.vote["scores"] == [float(text) for text in texts]
        assert _Scores.problems == ["the river"] * 6
        http.shutdown()
        http.server_close()
        with pytest.raises(openai.InternalServerError) as caught:
            ask(server, ("1", "2"), vote=vote, **options)
        assert caught.value.status_code == 502
        assert caught.value.code == "scorer_failed"
