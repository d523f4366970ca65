"""A chat that goes on from what is stored says what it says when it is read anew."""

from typing import Any

import pytest

from http_serving import Running, serving, tiny_llm
from serving import alone, assert_empty
from sparsekv import LLM
from sparsekv.server.prefixes import Prefixes

WORDS = (" river", " ship", " light", " old", " green", " mountain")
SYSTEM = {"role": "system", "content": "the old ship sails under the green light and slowly turns"}


def ask(server: Running, messages: list[Any], *, tokens: int = 24, **options: Any) -> Any:
    """Answers of whole words, so that a later turn cuts them into the same tokens."""
    encode = server.llm.tokenizer.encode
    bias = {str(encode(word)[0]): 50 for word in WORDS}
    options = {"temperature": 0, "extra_body": {"ignore_eos": True}} | options
    return server.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=tokens, logit_bias=bias, **options
    )


def anew(llm: LLM, messages: list[Any], tokens: int = 24) -> str:
    """By an engine that has nothing stored."""
    with serving(llm, prefix_cache=0) as server:
        reply = ask(server, messages, tokens=tokens)
        assert reply.usage.prompt_tokens_details.cached_tokens == 0
        return reply.choices[0].message.content


def cached(reply: Any) -> int:
    return reply.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("policy", ["dms", "lagged", "dense", "streaming", "dmc"])
def test_turns_go_on_exactly(policy: str) -> None:
    llm, other = tiny_llm(policy), tiny_llm(policy)
    messages: list[Any] = [{"role": "user", "content": "a river"}]
    before = 0
    with serving(llm) as server:
        for turn in range(3):
            reply = ask(server, messages)
            text = reply.choices[0].message.content
            assert text == anew(other, messages)
            assert cached(reply) == before
            before = reply.usage.prompt_tokens + 23  # the last token drawn is not placed
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"turn {turn}"}]
        assert server.service.prefixes.found > 0
    assert_empty(llm)


def test_chats_share_their_system_message() -> None:
    llm, other = tiny_llm(), tiny_llm()
    common = len(llm.chat_prompt([SYSTEM], chat_template_kwargs={"add_generation_prompt": False}))
    with serving(llm) as server:
        for words in ("the river", "a mountain", "light"):
            messages: list[Any] = [SYSTEM, {"role": "user", "content": words}]
            reply = ask(server, messages)
            assert cached(reply) == common
            assert reply.choices[0].message.content == anew(other, messages)
        samples = ask(server, messages, n=3, temperature=0.9, seed=4)
        assert cached(samples) == common
        assert server.service.prefixes.asked > server.service.prefixes.found > 4 * common - 1
        ids = llm.chat_prompt(messages)
        assert len(alone(llm.model, ids, 3)) == 3
    assert_empty(llm)


def test_a_policy_that_prunes_reuses_nothing() -> None:
    llm = tiny_llm("streaming")
    for policy in ("tova", "quest"):
        assert not Prefixes(_attached(policy), limit=10**6).usable
    assert Prefixes(llm, limit=10**6).usable
    assert not Prefixes(llm, limit=0).usable


def _attached(policy: str) -> LLM:
    import sparsekv
    from helpers import tiny_model

    model = tiny_model()
    sparsekv.attach(model, policy=policy, budget=64)
    return LLM(model, kv_memory="4MiB")


def test_what_was_used_longest_ago_goes_first() -> None:
    llm = tiny_llm()
    messages: list[list[Any]] = [[{"role": "user", "content": f"{word} " * 12}] for word in ("river", "ship", "light")]
    with serving(llm, prefix_cache=20_000) as server:
        for each in messages:
            ask(server, each, tokens=4)
        prefixes = server.service.prefixes
        assert 0 < prefixes.bytes <= 20_000
        assert len(prefixes._kept) == 2
        assert prefixes.bytes == sum(kept.bytes for kept in prefixes._kept.values())
        first = next(iter(prefixes._kept))
        assert first == tuple(llm.chat_prompt(messages[1]) + list(first[len(llm.chat_prompt(messages[1])) :]))


def test_a_turned_dial_makes_all_stored_stale() -> None:
    llm = tiny_llm()
    with serving(llm) as server:
        messages: list[Any] = [SYSTEM, {"role": "user", "content": "the river"}]
        ask(server, messages)
        ids, prefixes = [*llm.chat_prompt(messages), 1], server.service.prefixes
        assert prefixes.find(ids, epoch=0) is not None
        assert prefixes.find(ids, epoch=1) is None
