"""Text out: incremental, never half a character, cut at stop strings; streams."""

import asyncio
import random
from itertools import pairwise
from typing import Any

import pytest

import tiny
from serving import assert_empty, attached, engine, greedy, prompts
from sparsekv import LLM, SamplingParams
from sparsekv.engine.detokenizer import Detokenizer, decoder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def llm(tokenizer: Any) -> LLM:
    return engine(attached("dms", vocab_size=len(tokenizer)), tokenizer=tokenizer)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_the_whole(tokenizer: Any, seed: int) -> None:
    """Random tokens (mostly broken UTF-8) and real text with characters of up to four bytes, read whenever."""
    rng = random.Random(seed)
    prompt = tokenizer.encode("the old ship")
    ids = [rng.randrange(len(tokenizer)) for _ in range(60)]
    for output in (ids, tokenizer.encode("naïve 日本語 🙂🙃 the river é" * 4)):
        tokens, pieces = list(prompt), []
        detokenizer = Detokenizer(decoder(tokenizer), tokens, prompt=len(prompt))
        for token in output:
            tokens.append(token)
            if rng.random() < 0.7:
                pieces.append(detokenizer.advance())
        pieces.append(detokenizer.advance(final=True))
        whole = tokenizer.decode(prompt + output, skip_special_tokens=True)
        text = "".join(pieces)
        assert tokenizer.decode(prompt, skip_special_tokens=True) + text == whole
        assert detokenizer.tail(9) == text[-9:]
        assert detokenizer.length == len(text)
        assert detokenizer.text == text


def test_no_piece_of_valid_text_is_broken(tokenizer: Any) -> None:
    tokens: list[int] = []
    detokenizer = Detokenizer(decoder(tokenizer), tokens, prompt=0)
    for token in tokenizer.encode("日本語🙂 naïve"):
        tokens.append(token)
        assert "\ufffd" not in detokenizer.advance()


def test_detokenising_a_token_costs_the_same_after_a_long_text(tokenizer: Any) -> None:
    seen: list[int] = []
    decode = decoder(tokenizer)

    def counted(ids: list[int]) -> str:
        seen.append(len(ids))
        return decode(ids)

    tokens: list[int] = []
    detokenizer = Detokenizer(counted, tokens, prompt=0)
    for token in [17, 200] * 500:  # hardly ever a whole character
        tokens.append(token)
        detokenizer.advance()
    assert max(seen) < 20
    assert len(seen) < 1.5 * len(tokens)


@pytest.mark.parametrize("skip", [False, True])
def test_the_short_way_to_decode_is_the_tokenizers_own(tokenizer: Any, skip: bool) -> None:
    ids = [tokenizer.eos_token_id, *tokenizer.encode("naïve , don 't 🙂 .")]
    assert decoder(tokenizer, skip_special_tokens=skip)(ids) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_text_is_the_tokens_decoded(llm: LLM, tokenizer: Any) -> None:
    prompt = "The old ship sails under"
    (output,) = llm.generate(prompt, SamplingParams(n=2, max_tokens=15, seed=0))
    assert output.prompt == prompt
    assert output.prompt_token_ids == tokenizer.encode(prompt)
    for c in output.outputs:
        whole = tokenizer.decode(output.prompt_token_ids + c.token_ids, skip_special_tokens=True)
        assert prompt + c.text == whole


def test_a_stop_string_cuts_the_text(llm: LLM) -> None:
    params = {"max_tokens": 30, "seed": 4, "temperature": 1.0}
    whole = llm.generate("the river", SamplingParams(**params))[0].outputs[0]
    stop = whole.text[7:11]
    (c,) = llm.generate("the river", SamplingParams(stop=["never there", stop], **params))[0].outputs
    assert c.text == whole.text[: whole.text.index(stop)]
    assert (c.finish_reason, c.stop_reason) == ("stop", stop)
    assert c.token_ids == whole.token_ids[: len(c.token_ids)]
    assert len(c.token_ids) < len(whole.token_ids)
    assert_empty(llm)


def test_chat(llm: LLM, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "the quiet harbour"}]
    (a,) = llm.chat(messages, greedy(5))
    b, c = llm.chat([messages, messages], greedy(5))
    assert a.outputs[0].token_ids == b.outputs[0].token_ids == c.outputs[0].token_ids
    assert tokenizer.decode(a.prompt_token_ids) == "<|user|>the quiet harbour<|end|><|assistant|>"


def test_without_a_tokenizer_text_is_refused() -> None:
    llm = engine(attached("dense"))
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("text", greedy(1))
    assert llm.generate(prompts(3), greedy(2))[0].outputs[0].text == ""


def test_as_many_params_as_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate(["the"], [greedy(1), greedy(1)])


def test_streams_grow_to_what_generate_returns(llm: LLM) -> None:
    many = ["the river", "a ship", "slowly turns", "of stone"]
    params = [SamplingParams(n=2, max_tokens=12, seed=i, stop=["zq", "xyz"]) for i in range(4)]

    async def follow(prompt: str, each: SamplingParams) -> list:
        return [output async for output in llm.stream(prompt, each)]

    async def everything() -> list:
        return await asyncio.gather(*map(follow, many, params))

    for outputs, expected in zip(asyncio.run(everything()), llm.generate(many, params), strict=True):
        assert outputs[-1].finished
        assert not any(o.finished for o in outputs[:-1])
        assert len(outputs) > 5
        for before, after in pairwise(outputs):
            for a, b in zip(before.outputs, after.outputs, strict=True):
                assert b.text.startswith(a.text)
                assert b.token_ids[: len(a.token_ids)] == a.token_ids
        assert [c.text for c in outputs[-1].outputs] == [c.text for c in expected.outputs]
        assert [c.token_ids for c in outputs[-1].outputs] == [c.token_ids for c in expected.outputs]
    assert_empty(llm)


def test_leaving_a_stream_cancels_it(llm: LLM) -> None:
    async def leave() -> None:
        stream = llm.stream("the river", SamplingParams(n=2, max_tokens=200, seed=0, ignore_eos=True))
        async for output in stream:
            if len(output.outputs[0].token_ids) > 3:
                break
        await stream.aclose()

    asyncio.run(leave())
    assert_empty(llm)


def test_a_stream_of_a_bad_request_says_so(llm: LLM) -> None:
    async def bad() -> None:
        async for _ in llm.stream([], SamplingParams()):
            pass

    with pytest.raises(ValueError, match="empty"):
        asyncio.run(bad())


def test_an_error_in_the_engine_reaches_every_stream(tokenizer: Any) -> None:
    llm = engine(attached("dense", vocab_size=len(tokenizer)), tokenizer=tokenizer)

    def fail(step: Any) -> None:
        raise RuntimeError("the device is gone")

    llm.engine.runner.execute = fail  # type: ignore[method-assign, assignment]

    async def consume() -> None:
        async for _ in llm.stream("the river", SamplingParams()):
            pass

    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(consume())
