"""Dense attention over lists of slots, and the frame of every other oracle.

A token is placed, then its query attends to what is read. Methods differ in `place`, `read`, `observe` and
`end_prompt`; a prompt goes through them token by token, so its query i sees what was held and the prompt up to i.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(kw_only=True, eq=False)
class Slot:
    """One place in the cache of one KV head."""

    position: int
    """Of the token that lies here; of a merged slot (DMC), of its first token."""
    key: Tensor
    value: Tensor
    prompt: bool
    """Whether the token was part of a prompt."""
    importance: float = 0.0
    weight: float = 1.0
    """DMC: the sum of the importances merged here."""


@dataclass(kw_only=True, eq=False)
class Dense:
    """heads: KV heads; group: query heads for each. scale: head size ** -0.5 if None."""

    heads: int
    group: int
    layer: int = 0
    scale: float | None = None

    seen: int = field(default=0, init=False)
    slots: list[list[Slot]] = field(init=False)
    """By KV head, in slot order: an overwritten slot keeps its index, an appended one is last."""
    history: list[list[list[int]]] = field(default_factory=list, init=False)
    """After each token: by KV head the positions held, in slot order. After a prompt's last token: as pruned."""
    reads: list[list[int]] = field(default_factory=list, init=False)
    """For each decoded token: by KV head the slots attended to, its own included."""
    peak: list[int] = field(init=False)
    """By KV head: the most slots ever held, before a prompt is pruned too."""

    def __post_init__(self) -> None:
        self.slots = [[] for _ in range(self.heads)]
        self.peak = [0] * self.heads

    def prompt(self, query: Tensor, key: Tensor, value: Tensor, **inputs: Tensor) -> Tensor:
        """query [n, H * G, D], key and value [n, H, D], inputs [n, H] -> [n, H * G, D]."""
        each = [{name: x[i] for name, x in inputs.items()} for i in range(len(query))]
        out = [self._token(query[i], key[i], value[i], each[i], prompt=True) for i in range(len(query))]
        self.end_prompt(len(query))
        self.history[-1] = self.held()
        return torch.stack(out)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, **inputs: Tensor) -> Tensor:
        """query [H * G, D], key and value [H, D], inputs [H] -> [H * G, D]."""
        return self._token(query, key, value, inputs, prompt=False)

    def held(self) -> list[list[int]]:
        return [[slot.position for slot in slots] for slots in self.slots]

    # What methods change

    def place(self, head: int, new: Slot, **inputs: Any) -> int:
        """Store the token; the index of its slot."""
        self.slots[head].append(new)
        return len(self.slots[head]) - 1

    def read(self, head: int, queries: Tensor, *, written: int, prompt: bool) -> list[Slot]:
        """The slots that the queries [G, D] of one KV head attend to."""
        return self.slots[head]

    def observe(self, weights: list[list[Tensor]], *, prompt: bool) -> None:
        """weights[head][query head of its group]: over what was read."""

    def end_prompt(self, length: int) -> None:
        """The prompt's last token, of `length`, has been attended."""

    def _token(self, query: Tensor, key: Tensor, value: Tensor, inputs: dict[str, Tensor], *, prompt: bool) -> Tensor:
        out, weights, reads = [], [], []
        for head in range(self.heads):
            new = Slot(position=self.seen, key=key[head].double(), value=value[head].double(), prompt=prompt)
            written = self.place(head, new, **{name: x[head].item() for name, x in inputs.items()})
            self.peak[head] = max(self.peak[head], len(self.slots[head]))

            queries = query[head * self.group : (head + 1) * self.group].double()
            read = self.read(head, queries, written=written, prompt=prompt)
            keys, values = torch.stack([slot.key for slot in read]), torch.stack([slot.value for slot in read])
            scale = self.scale if self.scale is not None else keys.shape[1] ** -0.5
            weights.append([(keys @ q * scale).softmax(0) for q in queries])
            out += [w @ values for w in weights[-1]]
            reads.append(len(read))
        self.observe(weights, prompt=prompt)
        self.seen += 1
        self.history.append(self.held())
        if not prompt:
            self.reads.append(reads)
        return torch.stack(out)
