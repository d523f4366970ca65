"""Hidden states and logits apart, so that text length times vocabulary never exists at once.

A language model is a body (tokens to hidden states) and an output head (hidden states to logits). Distillation and
perplexity need the logits only a few positions at a time:

L = mean over positions of D(teacher, student), its gradient to the student's hidden states computed chunk by chunk. On
CUDA the divergence is compiled, which reads the logits as they are and writes their gradient, and nothing in float32.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(teacher logits, student logits), both [..., vocab] -> float32 [...], as in sparsekv.dms."""

CHUNK_ELEMENTS = 1 << 26
"""How many logits are held at once: 256 MiB of float32."""


class SplitModel:
    """A causal language model as body and output head; the base weights and attachments are the model's own.

    Raises ValueError for a model whose logits are not a plain function of its last hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.body: Any = model.get_decoder()
        self.head: Any = model.get_output_embeddings()
        config = model.config.get_text_config(decoder=True)
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.chunk = 1 << max(1, CHUNK_ELEMENTS // config.vocab_size).bit_length() - 1
        """Positions whose logits are held at once: a power of two, so that most texts are cut evenly."""
        self._check()

    def hidden(
        self, ids: Tensor, *, cache: Cache | None = None, pads: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """ids: int64 [B, S], each row one text, or packed with texts that `documents`, int64 [B, S], numbers in order
        -> the last hidden states [B, S, hidden_size], ready for `logits`. pads: int64 [B], tokens of padding that each
        row of the cache begins with, these ids included."""
        if cache is not None:
            padded = {} if pads is None else _padded(pads, begin=cache.get_seq_length(), length=ids.shape[1])
            return self.body(input_ids=ids, past_key_values=cache, use_cache=True, **padded).last_hidden_state
        positions = {} if documents is None else {"position_ids": _positions(documents)}
        return self.body(input_ids=ids, use_cache=False, documents=documents, **positions).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., vocab], in the model's dtype."""
        logits = self.head(hidden)
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits

    def divergence(self, teacher: Tensor, student: Tensor, divergence: Divergence) -> Tensor:
        """The mean divergence in nats per token, a scalar with gradient to the student's hidden states (not to the
        output head, which is frozen). teacher, student: [B, S, hidden_size]."""
        value = _ChunkedDivergence.apply(student.flatten(0, 1), teacher.flatten(0, 1), self, divergence)
        assert isinstance(value, Tensor)
        return value

    def chunks(self, *per_position: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tensors [N, ...] cut alike into pieces of at most `chunk` positions."""
        return zip(*(x.split(self.chunk) for x in per_position), strict=True)

    @torch.no_grad()
    def _check(self) -> None:
        ids = torch.arange(4, device=next(self.model.parameters()).device)[None]
        whole, ours = self.model(input_ids=ids, use_cache=False).logits, self.logits(self.hidden(ids))
        if not torch.allclose(whole.float(), ours.float(), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(self.model).__name__} scales its logits in a way that distillation here does not know; "
                "use a model whose logits are its output head's, as Llama's or Qwen's are"
            )


@cache
def _compiled(divergence: Divergence) -> Divergence:
    return torch.compile(divergence)


def _padded(pads: Tensor, *, begin: int, length: int) -> dict[str, Tensor]:
    """The model's keywords for columns begin .. begin + length - 1 of rows that are padded on the left."""
    columns = torch.arange(begin + length, device=pads.device)
    positions = (columns[begin:] - pads[:, None]).clamp(min=0)
    if length == 1:  # a decode step, which has no padding: told so, the cache need not look
        return {"position_ids": positions}
    return {"position_ids": positions, "attention_mask": columns >= pads[:, None]}


def _positions(documents: Tensor) -> Tensor:
    """int64 [B, S] -> int64 [B, S]: each token's place in its document."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - torch.where(begins, index, 0).cummax(-1).values


class _ChunkedDivergence(torch.autograd.Function):
    """The gradient is computed together with the value, so that no chunk's logits outlive it."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, split: SplitModel, divergence: Divergence) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device)
        divergence = _compiled(divergence) if student.is_cuda else divergence
        for s, t, into in split.chunks(student.detach(), teacher, gradient):
            with torch.enable_grad():
                s = s.requires_grad_()
                value = divergence(split.logits(t), split.logits(s)).sum()
                into.copy_(torch.autograd.grad(value, s)[0])
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outputs[0] / len(gradient)).to(gradient.dtype), None, None, None
