"""Which tokens a step may not sample, and which it must, as (sample, token) pairs."""

from sparsekv.engine.schedule.request import Sequence

Pairs = list[tuple[int, int]]


def banned(samples: list[Sequence]) -> Pairs:
    """What would end a sample before its min_tokens, or its thought right before its budget is spent."""
    pairs = [
        (i, t) for i, s in enumerate(samples) if s.sampled < s.request.params.min_tokens for t in s.request.stop_ids
    ]
    for i, sequence in enumerate(samples):
        budget = sequence.request.params.thinking
        if budget is not None and (token := budget.banned(sequence)) is not None:
            pairs.append((i, token))
    return pairs


def forced(samples: list[Sequence]) -> Pairs:
    """The end marker of a thought whose budget is spent."""
    pairs = []
    for i, sequence in enumerate(samples):
        budget = sequence.request.params.thinking
        if budget is not None and (token := budget.forced(sequence)) is not None:
            pairs.append((i, token))
    return pairs
