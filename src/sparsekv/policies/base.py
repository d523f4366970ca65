"""The protocol of a policy.

A forward hands each governed layer a `Step`. For many tokens per sequence (prefill) the layer attends over [stored] +
[chunk], places the chunk, then lets the policy prune; for one token per sequence (decode) it places, then attends:

    prefill   ops.prefill(marks) -> place -> prune
    decode    place -> read -> ops.decode -> observe

| method | overrides |
|---|---|
| dense | nothing |
| DMS, StreamingLLM | window, marks |
| TOVA, H2O, random | slots (the slot to overwrite once the budget is full), needs_weights + observe, prune, appends |
| SnapKV | prune |
| DMC | place (merge into the last slot) |
| Quest | read (a view with fewer pages) |

A policy holds no tensors of its own that belong to a sequence: one policy serves many caches, and rows are forked and
reordered. What it must remember from step to step (accumulated weights) lives in `Step.state`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsekv.ops.decode import decode
from sparsekv.ops.layout import Batch, LayerPages, LinearMarks
from sparsekv.ops.place import align_marks, place
from sparsekv.ops.prefill import prefill


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one layer sees of one forward; T tokens of B sequences, packed."""

    layer: int
    batch: Batch
    hidden: Tensor
    """[T, hidden_size]: the attention layer's input, after its input norm; with DMS's neuron source its logits
    [T, kv_heads]."""
    query: Tensor
    """[T, H * G, D], after RoPE."""
    key: Tensor
    """[T, H, D], after RoPE."""
    value: Tensor
    """[T, H, D]."""
    seen: Tensor
    """int32 [B]: tokens that this layer saw of each sequence before the step."""
    scale: float
    state: dict[str, Tensor] = field(default_factory=dict)
    """What the policy remembers of this layer in this cache, empty at first: tensors [R, ...] over the cache's rows,
    forked, reordered and taken back with them."""

    @property
    def positions(self) -> Tensor:
        """int32 [T]: each token's position in its own sequence, padding not counted."""
        return self.batch.positions(self.seen)


class Policy:
    """Dense attention, and the base of every other policy: all tokens are kept and read."""

    name: ClassVar[str] = "dense"
    needs_weights: ClassVar[bool] = False
    """Whether `observe` wants the attention weights of each decode step."""
    lag: int = 0
    """A decision made at position k + lag is about token k."""

    @property
    def rewrites(self) -> bool:
        """Whether stored slots may change other than by the ring rule; forks then share no page."""
        return any(getattr(type(self), name) is not getattr(Policy, name) for name in ("slots", "place", "prune"))

    def window(self, layer: int) -> int:
        """How long a marked token of this layer stays visible; 0 if the policy marks nothing. At least `lag`."""
        return 0

    def marks(self, step: Step) -> Tensor | None:
        """bool [T, H]: which tokens are forgotten once they leave the window, by the position that decides (lag)."""
        return None

    def decode_marks(self, step: Step) -> Tensor | LinearMarks | None:
        """As marks, for a decode step; a policy without lag may leave the arithmetic to the kernel that places."""
        return self.marks(step)

    def slots(self, step: Step, pages: LayerPages) -> Tensor | None:
        """int32 [B, H]: the slot that a decoded token overwrites, -1 to append; None for the ring rule."""
        return None

    def appends(self, pages: LayerPages) -> Tensor:
        """bool [R, H]: which heads the next decoded token may lengthen; known before the step, so that a full pool
        is refused before anything is written. The ring rule; a policy with a budget says which heads are below it."""
        if pages.window <= self.lag:
            return torch.ones_like(pages.lengths, dtype=torch.bool)
        entry = (pages.seen % pages.window).long()[:, None, None].expand(-1, pages.lengths.shape[1], 1)
        marked = (pages.ring.gather(-1, entry)[..., 0] & 1).bool()
        return ~(marked & (pages.seen >= pages.window)[:, None])

    def most_held(self, layer: int, tokens: int) -> int:
        """An upper bound of the slots that a head of this layer ever takes for a sequence of `tokens` tokens."""
        return tokens

    def place(self, step: Step, pages: LayerPages, marks: Tensor | LinearMarks | None) -> None:
        """Store the step's tokens. marks: bool [T, H], aligned to their tokens."""
        slots = self.slots(step, pages) if step.batch.longest == 1 else None
        place(pages, step.batch, step.key, step.value, marks=marks, slots=slots)

    def read(self, step: Step, pages: LayerPages) -> LayerPages:
        """What a decoded query reads: `pages`, or a view of it with other page tables and lengths."""
        return pages

    def observe(self, step: Step, pages: LayerPages, weights: Tensor) -> None:
        """Sees weights [B, H * G, longest head] of a decode step, if `needs_weights`."""

    def prune(self, step: Step, pages: LayerPages) -> Tensor | None:
        """bool [B, H, longest head]: the slots to keep after a prefill chunk; None keeps all. Carried out when the
        forward ends, in layers without a window."""
        return None


def prefill_layer(policy: Policy, step: Step, pages: LayerPages) -> Tensor:
    """Attend and place many tokens per sequence: [T, H * G, D]. The caller prunes.

    Raises PoolExhausted where the pool has too few pages; nothing of this layer is placed then.
    """
    marks = _aligned(policy, step, pages, policy.marks(step))
    out = prefill(pages, step.batch, step.query, step.key, step.value, scale=step.scale, marks=marks)
    policy.place(step, pages, marks)
    return out


def decode_layer(policy: Policy, step: Step, pages: LayerPages) -> tuple[Tensor, LayerPages]:
    """Place and attend one token per sequence: ([T, H * G, D], the pages that were read).

    Raises PoolExhausted where the pool has too few pages.
    """
    marks = policy.decode_marks(step)
    policy.place(step, pages, marks if isinstance(marks, LinearMarks) else _aligned(policy, step, pages, marks))
    view, rows = policy.read(step, pages), step.batch.rows
    result = decode(view, rows, step.query, scale=step.scale, return_weights=policy.needs_weights)
    if result.weights is not None:
        policy.observe(step, pages, result.weights)
    return result.out, view


def _aligned(policy: Policy, step: Step, pages: LayerPages, marks: Tensor | None) -> Tensor | None:
    if marks is None or policy.lag == 0:
        return marks
    if policy.lag > 1:
        raise ValueError(
            f"lag is {policy.lag}, immediate eviction: a cache of pages cannot look back so far; it is for comparisons "
            "by the mask, without a cache"
        )
    return align_marks(pages, step.batch, marks, policy.lag)
