"""Parts of replies that chats and completions share: usage and log-probabilities, in OpenAI's shapes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparsekv.engine.kv import RequestKV
from sparsekv.engine.outputs import CompletionOutput, Logprob, RequestOutput


def usage(outputs: Iterable[RequestOutput], *, cached: int = 0) -> dict[str, Any]:
    """Tokens, and under `kv` what the samples held and read: tokens of a head, averaged over layers and heads. cached:
    prompt tokens that were stored."""
    outputs = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(sample.span[1] - sample.span[0] for output in outputs for sample in output.outputs)
    kv = RequestKV.total([output.kv for output in outputs])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
        "kv": kv.to_dict(),
    }


def chat_logprobs(entries: Sequence[dict[int, Logprob]], ids: Sequence[int], count: int) -> dict[str, Any]:
    """{"content": [{token, logprob, bytes, top_logprobs}]} of some positions."""
    content = []
    for token, entry in zip(ids, entries, strict=True):
        top = sorted(entry.values(), key=lambda each: each.rank)[:count]
        content.append(_named(entry[token]) | {"top_logprobs": [_named(each) for each in top]})
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[dict[int, Logprob] | None],
    ids: Sequence[int],
    count: int,
    *,
    decode: Callable[[list[int]], str],
    offset: int = 0,
) -> dict[str, Any]:
    """{tokens, token_logprobs, top_logprobs, text_offset} of some positions; None where nothing stands before a token.
    offset: characters before the first."""
    texts, values, tops, offsets = [], [], [], []
    for token, entry in zip(ids, entries, strict=True):
        found = None if entry is None else entry[token]
        text = decode([token]) if found is None else found.decoded_token or ""
        texts.append(text)
        values.append(None if found is None else found.logprob)
        offsets.append(offset)
        offset += len(text)
        if entry is None:
            tops.append(None)
            continue
        best = sorted(entry.values(), key=lambda each: each.rank)
        kept = [each for each in best if each.rank <= count or each is found]
        top: dict[str, float] = {}
        for each in kept:
            top.setdefault(each.decoded_token or "", each.logprob)
        tops.append(top)
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def sample_ids(sample: CompletionOutput) -> list[int]:
    """The tokens that have log-probabilities."""
    return sample.token_ids[: len(sample.logprobs or ())]


def _named(found: Logprob) -> dict[str, Any]:
    text = found.decoded_token or ""
    return {"token": text, "logprob": found.logprob, "bytes": list(text.encode("utf-8", "replace"))}
