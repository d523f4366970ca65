"""The protocol of a policy: where the next token goes, and what the next query reads. Nothing runs here: attend/ does.

A forward hands each layer a `Step`. For many tokens per sequence (prefill) the layer attends over [stored] + [chunk],
then stores the chunk; for one token per sequence (decode) it stores, then attends. A prompt ends once, whatever its
chunks: the engine says so, a plain Transformers forward is known to have been the last when a single token comes.

    prefill   store -> marks -> attention -> place -> placed -> observe
    prompt    finish_prompt                         which slots to keep
    decode    store -> decode_marks -> slots -> place -> placed -> read -> attention -> observe

| method | says |
|---|---|
| dense | nothing |
| DMS, StreamingLLM | window, marks |
| TOVA, H2O, random | slots (the slot to overwrite once the budget is full), finish_prompt, appends |
| SnapKV | finish_prompt |
| DMC | store (the running mean that takes the last slot's place), marks |
| Quest | read (a view with fewer pages) |

A policy holds no tensor that belongs to a sequence: one policy serves many caches, and rows are forked and reordered.
What it must remember it declares in `state` and finds in `Step.state`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsekv.cache.state import HeadShape, LayerState, State
from sparsekv.ops.layout import Batch, LaterMarks, LayerPages, LinearMarks


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one layer sees of one forward; T tokens of B sequences, packed."""

    layer: int
    batch: Batch
    hidden: Tensor
    """[T, hidden_size]: the attention layer's input, after its input norm; with a neuron source what was read off the
    queries and keys before RoPE: logits [T, kv_heads], or for DMC a packed dmc.BeforeRope."""
    query: Tensor
    """[T, H * G, D], after RoPE."""
    key: Tensor
    """[T, H, D], after RoPE."""
    value: Tensor
    """[T, H, D]."""
    seen: Tensor
    """int32 [B]: tokens that this layer saw of each sequence before the step."""
    scale: float
    most: int
    """At least the slots that a head of these rows holds after the step; known without asking the device."""
    samples: Tensor | None = None
    """int64 [R + 1], by row: which copy of its prompt it is, 0 for nobody's copy."""
    reads: Tensor | None = None
    """int64 [2, R + 1, H], by row: the account that a decode step adds to, if one is kept: tokens, and pages whose
    bounds were read. A policy that reads less than all adds to it itself."""
    state: LayerState = field(default_factory=LayerState)

    @property
    def positions(self) -> Tensor:
        """int32 [T]: each token's position in its own sequence, padding not counted."""
        return self.batch.positions(self.seen, total=self.key.shape[0])

    @property
    def decoding(self) -> bool:
        """Whether it is a single token of each sequence."""
        return self.batch.longest == 1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one layer knows when the prompts of B rows are over, all their tokens attended and stored."""

    layer: int
    rows: Tensor
    """int64 [B], distinct."""
    scale: float
    most: int
    """At least the slots that a head of these rows holds."""
    state: LayerState

    def one_each(self) -> Batch:
        """One query of each row."""
        starts = torch.arange(len(self.rows) + 1, dtype=torch.int32, device=self.rows.device)
        return Batch(rows=self.rows, starts=starts, longest=1)


class Policy:
    """Dense attention: all tokens are kept and read.

    The base of every other policy, whose docstring begins with what `sparsekv policies` says of it.
    """

    name: ClassVar[str] = "dense"
    masks: ClassVar[bool] = True
    """Whether window and marks say all, so that a forward without a cache can apply the rule as a mask."""
    prunes: ClassVar[bool] = False
    """Whether `finish_prompt` wants to hear that a prompt is over. The prompt itself is read densely then."""
    rewrites: ClassVar[bool] = False
    """Whether stored slots may change other than by the ring rule; forks then share no page."""
    selects: ClassVar[bool] = False
    """Whether `read` gives less than all that is held."""
    weighs: ClassVar[bool] = False
    """Whether `observe` wants each query's log-sum-exp."""
    ranks_by_weights: ClassVar[bool] = False
    """Whether it reads attention weights, which costs a second pass over the keys: at each step where it `weighs`, else
    once a prompt."""
    trained: ClassVar[bool] = False
    """Whether it decides by parameters of its own."""
    budgets_prompt: ClassVar[bool] = False
    """Whether its budget is for the prompt alone, and all that follows is kept beyond it."""
    frees: ClassVar[bool] = True
    """Whether it holds less than it has seen."""
    recordable: ClassVar[bool] = True
    """Whether its decode step can be recorded in a CUDA graph: tensor operations alone, of sizes known beforehand."""
    pads_chunks: ClassVar[bool] = True
    """Whether what it does with chunks leaves sequences of row -1 alone, so that they too can be recorded, padded."""
    page_size: int | None = None
    """Slots of a page, where the method needs so many; None leaves it to the cache."""
    lag: int = 0
    """A decision made at position k + lag is about token k."""

    def state(self, shape: HeadShape) -> list[State]:
        """What is to be remembered, see cache.state."""
        return []

    def window(self, layer: int) -> int:
        """How long a marked token of this layer stays visible; 0 if the policy marks nothing. At least `lag`."""
        return 0

    def most_held(self, layer: int, *, prompt: int, tokens: int) -> int:
        """An upper bound of the slots that a head of this layer takes for a sequence of `tokens` tokens, `prompt` of
        them the prompt, between steps and once the prompt is over."""
        return tokens

    def most_in_prompt(self, layer: int, tokens: int) -> int:
        """The same while a prompt of `tokens` tokens is read."""
        return tokens

    def appends(self, pages: LayerPages) -> Tensor:
        """bool [R, H]: which heads the next decoded token may lengthen; known before the step, so that a full pool
        is refused before anything is written. The ring rule; a policy with a budget says which heads are below it."""
        if pages.window <= self.lag:
            return torch.ones_like(pages.lengths, dtype=torch.bool)
        entry = (pages.seen % pages.window).long()[:, None, None].expand(-1, pages.lengths.shape[1], 1)
        marked = (pages.ring.gather(-1, entry)[..., 0] & 1).bool()
        return ~(marked & (pages.seen >= pages.window)[:, None])

    def store(self, step: Step, pages: LayerPages) -> tuple[Tensor, Tensor]:
        """The keys and values to store and attend to, [T, H, D] each."""
        return step.key, step.value

    def marks(self, step: Step) -> Tensor | None:
        """bool [T, H]: which tokens are forgotten once they leave the window, by the position that decides (lag)."""
        return None

    def decode_marks(self, step: Step) -> Tensor | LinearMarks | LaterMarks | None:
        """As marks, for a decode step; a policy without lag may leave the arithmetic to the kernel that places."""
        return self.marks(step)

    def slots(self, step: Step, pages: LayerPages) -> Tensor | None:
        """int32 [B, H]: the slot that a decoded token overwrites, -1 to append; None for the ring rule."""
        return None

    def placed(self, step: Step, pages: LayerPages, slots: Tensor | None) -> None:
        """The step's tokens have been stored; slots: as chosen. See ops.layout.written and appended for where."""

    def read(self, step: Step, pages: LayerPages, slots: Tensor | None) -> LayerPages | None:
        """What a decoded query reads: a view whose rows are the step's sequences, in order, with step.reads brought up
        to date; None for all. slots: as chosen for the step's token."""
        return None

    def observe(self, step: Step, pages: LayerPages, lse: Tensor | None) -> None:
        """The step has been attended. lse: [T, H * G], the log-sum-exp of each query's scores, if the policy weighs."""

    def finish_prompt(self, prompt: Prompt, pages: LayerPages) -> Tensor | None:
        """bool [B, H, W], W at least the longest head: the slots to keep of a prompt that is over; None keeps all.
        Called once a prompt, if the policy prunes."""
        return None
