"""What a new token does to a sample: text, log-probabilities, and whether it ends there."""

from typing import Any

from sparsekv.engine.outputs import Logprob
from sparsekv.engine.schedule.request import Sequence

TokenLogprobs = tuple[float, int, list[float], list[int]]
"""The sampled token's log-probability and rank; the most probable tokens' log-probabilities and ids."""


def append_token(sequence: Sequence, token: int, logprobs: TokenLogprobs | None, tokenizer: Any) -> None:
    """Add a sampled token; sets finish_reason, stop_reason and, where a stop string cuts it, text."""
    request, params = sequence.request, sequence.request.params
    sequence.tokens.append(token)
    if params.logprobs is not None and logprobs is not None:
        sequence.logprobs.append(_logprobs(token, logprobs, params.logprobs, tokenizer))
        sequence.cumulative_logprob += logprobs[0]
    count = len(sequence.output)
    if token in request.stop_ids and count >= params.min_tokens:
        sequence.finish_reason = "stop"
        sequence.stop_reason = token if token in (params.stop_token_ids or ()) else None
        return
    if sequence.detokenizer is not None:
        added = sequence.detokenizer.push(token)
        if added and count >= params.min_tokens and _stopped_by_text(sequence, len(added)):
            return
    if count >= request.most_new:
        sequence.finish_reason = "length"


def _stopped_by_text(sequence: Sequence, added: int) -> bool:
    """Whether a stop string ends within the last `added` characters; the text then ends before the first such."""
    assert sequence.detokenizer is not None
    text, found = sequence.detokenizer.text, []
    for stop in sequence.request.params.stops:
        at = text.find(stop, max(len(text) - added - len(stop) + 1, 0))
        if at >= 0:
            found.append((at, stop))
    if not found:
        return False
    at, stop = min(found)
    sequence.text, sequence.finish_reason, sequence.stop_reason = text[:at], "stop", stop
    return True


def _logprobs(token: int, logprobs: TokenLogprobs, count: int, tokenizer: Any) -> dict[int, Logprob]:
    chosen, rank, top, ids = logprobs

    def entry(token: int, value: float, rank: int) -> Logprob:
        text = None if tokenizer is None else tokenizer.decode([token])
        return Logprob(logprob=value, rank=rank, decoded_token=text)

    entries = {i: entry(i, value, r + 1) for r, (i, value) in enumerate(zip(ids[:count], top[:count], strict=True))}
    entries.setdefault(token, entry(token, chosen, rank))
    return {token: entries.pop(token)} | entries
