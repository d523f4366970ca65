"""Which tokens lie in the slots of a cache, read off the memory itself.

Every key that a policy stores is remembered beside the position it was stored for; a slot's token is the one whose key
it holds, bit for bit. A merged slot (DMC) is the newest token's that went into it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsekv.ops.decode.reference import gather_slots
from sparsekv.ops.layout import LayerPages
from sparsekv.policies import Policy, Step


class StoredKeys:
    """The keys of one sequence, by layer, in the order of its tokens."""

    def __init__(self) -> None:
        self.parts: dict[int, list[Tensor]] = defaultdict(list)
        """By layer: [T, H, D] of each forward."""
        self.read: dict[int, LayerPages | None] = {}
        """By layer: what the last decoded query read, None for all."""

    @contextmanager
    def watching(self, policies: Sequence[Policy]) -> Iterator[None]:
        """Within, forwards of one sequence leave what they store and read here."""
        unique = {id(policy): policy for policy in policies}.values()
        for policy in unique:
            self._watch(policy)
        try:
            yield
        finally:
            for policy in unique:
                del policy.store, policy.read

    def tokens_in(self, layer: int, pages: LayerPages) -> Tensor:
        """bool [H, tokens]: which tokens the first row of a view of the layer holds."""
        keys = torch.cat(self.parts[layer]).cpu()
        slots = gather_slots(pages, 0, pages.lengths[0].tolist())
        found = torch.zeros(keys.shape[1], len(keys), dtype=torch.bool)
        for head, (stored, _) in enumerate(slots):
            places: dict[bytes, list[int]] = defaultdict(list)
            for position, key in enumerate(_bytes(keys[:, head])):
                places[key].append(position)
            for key in _bytes(stored.cpu()):
                found[head, places[key].pop()] = True
        return found

    def _watch(self, policy: Policy) -> None:
        store, read = policy.store, policy.read

        def remember(step: Step, pages: LayerPages) -> tuple[Tensor, Tensor]:
            key, value = store(step, pages)
            self.parts[step.layer].append(key.clone())
            return key, value

        def remember_view(step: Step, pages: LayerPages, slots: Tensor | None) -> LayerPages | None:
            self.read[step.layer] = read(step, pages, slots)
            return self.read[step.layer]

        policy.store, policy.read = remember, remember_view


def _bytes(keys: Tensor) -> list[bytes]:
    """[N, D] as N byte strings."""
    raw = keys.contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in raw]
