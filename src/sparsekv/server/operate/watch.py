"""Which tokens of a conversation the cache still holds, read off the memory itself while the engine runs.

Each key that a policy stores for a watched request leaves a print, 64 bits of its own bits, beside its token's number.
A look copies the request's pages as a swap would and finds the print of what each slot holds: a token is held by the
heads in whose slots its key lies. A merged slot (DMC) is the newest token's that went into it. As in
modeling.tracing.held, but for a cache under way, and without keeping keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.swap import SwappedRow
from sparsekv.engine.llm import LLM
from sparsekv.engine.schedule.request import Sequence as Sample
from sparsekv.engine.schedule.request import Status
from sparsekv.modeling.attach import attachment_of
from sparsekv.ops.layout import LayerPages
from sparsekv.policies import Policy, Step


@dataclass(frozen=True, kw_only=True)
class Look:
    """A sample's cache at one moment."""

    tokens: list[int]
    """Token ids that have been in the cache."""
    held: list[int]
    """How many heads hold each, over all layers."""
    lengths: list[list[int]]
    """[layers][kv_heads]: slots in use."""
    bytes: int
    """Of its pages, those it shares with others included."""
    dense_bytes: int
    """Of the keys and values of all its tokens."""

    @property
    def heads(self) -> int:
        return sum(len(layer) for layer in self.lengths)


class Watch:
    """One engine's. Raises ValueError where decode steps are recorded in CUDA graphs, which nothing can look into."""

    def __init__(self, llm: LLM) -> None:
        if llm.engine.runner.graphs is not None:
            raise ValueError("the cache cannot be watched inside CUDA graphs; serve with --enforce-eager")
        self.llm = llm
        self._prints: dict[str, list[list[Tensor]]] = {}
        """By request, of its first sample: by layer, int64 [T, H] of each forward, on the device."""
        dim = llm.engine.runner.ragged.pool.kv.shape[-1]
        random = torch.Generator().manual_seed(0)
        self._weights = torch.randint(-(2**62), 2**62, (dim,), generator=random)
        for policy in {id(layer.policy): layer.policy for layer in attachment_of(llm.model).layers}.values():
            self._wrap(policy)

    @contextmanager
    def watching(self, request_id: str) -> Iterator[None]:
        """Within, what is stored for this request leaves its prints."""
        layers = len(attachment_of(self.llm.model).layers)
        self._prints[request_id] = [[] for _ in range(layers)]
        try:
            yield
        finally:
            del self._prints[request_id]

    def look(self, request_id: str) -> Look | None:
        """The first sample's cache now; None where it has none. Waits for the step under way."""
        return self.llm.between_steps(lambda: self._look(request_id))

    def of(self, request_id: str, tokens: list[int], state: SwappedRow) -> Look:
        """The cache that a finished first sample left in host memory."""
        prints, pool = self._prints[request_id], self.llm.engine.runner.ragged.pool
        placed = int(state.seen.max())
        counts = torch.zeros(placed, dtype=torch.int64)
        stored, first = self._of(state.kv[:, 0]), 0
        for layer, lengths in enumerate(state.lengths.tolist()):
            known = torch.cat(prints[layer]).cpu() if prints[layer] else torch.zeros(0, len(lengths), dtype=torch.int64)
            for head, length in enumerate(lengths):
                pages = -(-length // pool.page_size)
                slots = stored[first : first + pages].flatten()[:length]
                counts[: len(known)] += torch.isin(known[:placed, head], slots)
                first += pages
        each = 2 * state.kv.shape[-1] * state.kv.element_size() * state.lengths.numel()
        return Look(
            tokens=tokens[:placed],
            held=counts.tolist(),
            lengths=state.lengths.tolist(),
            bytes=state.bytes,
            dense_bytes=each * placed,
        )

    def _look(self, request_id: str) -> Look | None:
        engine = self.llm.engine
        request = engine.requests.get(request_id)
        sample = None if request is None else request.sequences[0]
        if sample is None or sample.status not in (Status.RUNNING, Status.SWAPPED):
            return None
        state: Any = sample.swapped if sample.row is None else engine.runner.swap_out(sample.row)
        return None if state is None else self.of(request_id, list(sample.tokens), state)

    def _wrap(self, policy: Policy) -> None:
        store = policy.store

        def remember(step: Step, pages: LayerPages) -> tuple[Tensor, Tensor]:
            key, value = store(step, pages)
            if self._prints:
                self._note(step, key)
            return key, value

        policy.store = remember

    def _note(self, step: Step, key: Tensor) -> None:
        owners: dict[int | None, Sample] = {sample.row: sample for sample in self.llm.engine.scheduler.running}
        starts = step.batch.starts.tolist()
        for i, row in enumerate(step.batch.rows.tolist()):
            sample = owners.get(row)
            prints = None if sample is None or sample.index else self._prints.get(sample.request.id)
            if prints is not None:
                prints[step.layer].append(self._of(key[starts[i] : starts[i + 1]]))

    def _of(self, keys: Tensor) -> Tensor:
        """int64 [...]: the prints of keys [..., D]."""
        bits = keys.contiguous().view(_INTEGERS[keys.element_size()]).long()
        return (bits * self._weights.to(keys.device)).sum(-1)


_INTEGERS: dict[int, torch.dtype] = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; of a character that several share, the last has it and the others are empty."""
    texts, waiting = list[str](), list[int]()
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False)
        whole = not text.endswith("\ufffd") or len(waiting) > 4
        texts.append(text if whole else "")
        if whole:
            waiting.clear()
    return texts
