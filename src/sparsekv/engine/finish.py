"""What a new token does to a sample: log-probabilities, and whether it ends there."""

from collections.abc import Callable
from functools import lru_cache

from sparsekv.engine.outputs import Logprob
from sparsekv.engine.schedule.request import Sequence

TokenLogprobs = tuple[float, int, list[float], list[int]]
"""The sampled token's log-probability and rank; the most probable tokens' log-probabilities and ids."""
Decode = Callable[[int], str | None]
"""The text of one token, where there is a tokenizer."""


def append_token(sequence: Sequence, token: int, logprobs: TokenLogprobs | None, decode: Decode) -> None:
    """Add a sampled token; sets finish_reason, stop_reason and, where a stop string cuts it, text."""
    request, tokens = sequence.request, sequence.tokens
    tokens.append(token)
    if request.plain and token not in request.stop_ids and len(tokens) < request.longest:
        return  # nearly all: every further line here costs a step of thousands of samples
    params = request.params
    if params.logprobs is not None and logprobs is not None:
        sequence.logprobs.append(by_token(token, logprobs, params.logprobs, decode))
        sequence.cumulative_logprob += logprobs[0]
    count = len(tokens) - len(request.prompt)
    if token in request.stop_ids and count >= params.min_tokens:
        sequence.finish_reason = "stop"
        sequence.stop_reason = token if token in (params.stop_token_ids or ()) else None
        return
    if params.stops and sequence.detokenizer is not None and _may_end(params.stops, decode(token)):
        added = sequence.detokenizer.advance()
        if added and count >= params.min_tokens and _stopped_by_text(sequence, len(added)):
            return
    if count >= request.most_new:
        sequence.finish_reason = "length"


@lru_cache(2**16)
def _may_end(stops: tuple[str, ...], text: str | None) -> bool:
    """Whether a stop string may end in a token of this text, so that the sample's text must be read now. What a token
    says depends on its neighbours in its spaces and in broken characters alone."""
    if text is None:
        return False
    return "\ufffd" in text or any(s[-1] in text or s[-1].isspace() or s[-1] == "\ufffd" for s in stops)


def _stopped_by_text(sequence: Sequence, added: int) -> bool:
    """Whether a stop string ends within the last `added` characters; the text then ends before the first such."""
    detokenizer, stops = sequence.detokenizer, sequence.request.params.stops
    assert detokenizer is not None
    text = detokenizer.tail(added + max(map(len, stops)) - 1)
    found = []
    for stop in stops:
        at = text.find(stop, max(len(text) - added - len(stop) + 1, 0))
        if at >= 0:
            found.append((at, stop))
    if not found:
        return False
    at, stop = min(found)
    sequence.text = detokenizer.text[: detokenizer.length - len(text) + at]
    sequence.finish_reason, sequence.stop_reason = "stop", stop
    return True


def by_token(token: int, logprobs: TokenLogprobs, count: int, decode: Decode) -> dict[int, Logprob]:
    """The token's, then those of the `count` most probable."""
    chosen, rank, top, ids = logprobs

    def entry(token: int, value: float, rank: int) -> Logprob:
        return Logprob(logprob=value, rank=rank, decoded_token=decode(token))

    entries = {i: entry(i, value, r + 1) for r, (i, value) in enumerate(zip(ids[:count], top[:count], strict=True))}
    entries.setdefault(token, entry(token, chosen, rank))
    return {token: entries.pop(token)} | entries
