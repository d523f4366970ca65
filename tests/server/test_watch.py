"""The live view of a cache: what it tells is what memory holds."""

from typing import Any

import pytest
import torch

from http_serving import Running, serving, tiny_llm
from serving import alone, assert_empty
from sparsekv import inspect
from sparsekv.server.operate.watch import pieces

MESSAGES: list[Any] = [{"role": "user", "content": "the river slowly turns under the old green mountain 🙂"}]


def looks(running: Running, tokens: int, **options: Any) -> list[dict[str, Any]]:
    stream = running.client().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=tokens,
        stream=True,
        extra_body={"watch": True, "ignore_eos": True},
        **{"temperature": 0} | options,
    )
    return [chunk.cache for chunk in stream if getattr(chunk, "cache", None)]


@pytest.mark.parametrize("policy", ["dms", "lagged", "dense", "streaming"])
def test_a_look_is_what_inspect_finds(policy: str) -> None:
    llm = tiny_llm(policy)
    with serving(llm) as server:
        found = looks(server, 30)
        ids = llm.chat_prompt(MESSAGES)
        whole = ids + alone(llm.model, ids, 30)[:-1]  # the last one drawn is never placed
        last = found[-1]
        assert len(last["held"]) == len(whole)
        told = "".join(text for look in found for text in look["texts"])
        assert told == llm.tokenizer.decode(whole)[: len(told)]
        assert len(told) > len(llm.tokenizer.decode(whole)) - 4  # an unfinished character is not told
    if policy != "streaming":  # which would prune no other prompt than this one
        trace = inspect(llm.model, torch.tensor(whole))
        assert last["held"] == trace.held.sum((0, 1)).tolist()
        assert last["lengths"] == trace.held.sum(-1).tolist()
    assert last["heads"] == sum(map(len, last["lengths"]))
    assert sum(last["held"]) == sum(map(sum, last["lengths"]))
    assert last["dense_bytes"] == len(whole) * last["heads"] * 2 * 8 * 8
    assert (last["bytes"] < last["dense_bytes"]) == (policy != "dense")
    assert_empty(llm)


def test_looks_follow_a_long_answer_and_its_swaps() -> None:
    """Of the first of several samples, over a pool that is too small for all."""
    llm = tiny_llm(pages=330)
    with serving(llm) as server:
        found = looks(server, 150, n=6, temperature=1.0, seed=2)
        assert llm.engine.preemptions > 0
        assert len(found) > 2
        for look in found:
            assert sum(look["held"]) == sum(map(sum, look["lengths"]))
            assert all(held == look["heads"] for held in look["held"][-4:])  # the window
        assert [look["first"] for look in found[1:]] == [len(look["held"]) for look in found[:-1]]
    assert_empty(llm)


def test_nothing_is_kept_of_a_watched_request(running: Running) -> None:
    looks(running, 5)
    watch: Any = running.service.watch
    assert watch._prints == {}


def test_pieces_share_a_character() -> None:
    tokenizer = tiny_llm().tokenizer
    ids = tokenizer.encode("the 🙂 ship")
    texts = pieces(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "the 🙂 ship"
    assert "" in texts
