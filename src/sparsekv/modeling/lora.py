"""The LoRA of an adapter, merged into the weights: W' = W + alpha / r * B A (arXiv 2106.09685), in place.

Merged weights run at the base model's speed, and compiled code and CUDA graphs need not know of them. The originals are
kept in the CPU's memory, so that they come back bit for bit. Tensors have PEFT's names, `<module>.lora_A.weight`
[r, in] and `<module>.lora_B.weight` [out, r].
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

A, B = ".lora_A.weight", ".lora_B.weight"


class Lora(ABC):
    """What an attached model knows of the low-rank weights in it."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Its tensors, by PEFT's names."""

    @abstractmethod
    def out(self) -> AbstractContextManager[None]:
        """Within, the weights are the base model's."""


class MergedLora(Lora):
    """state: PEFT's names -> tensors, any float dtype; scale: alpha / r. `put_in` merges.

    Raises ValueError for names or shapes that are not this model's.
    """

    def __init__(self, model: nn.Module, state: dict[str, Tensor], *, scale: float) -> None:
        self._state, self._scale = state, scale
        self._modules = {name.removesuffix(A): _linear(model, name, state) for name in state if name.endswith(A)}
        if len(state) != 2 * len(self._modules):
            raise ValueError("the LoRA weights are damaged: every lora_A needs its lora_B; fetch or train them again")
        self._originals = {name: m.weight.detach().to("cpu", copy=True) for name, m in self._modules.items()}

    def state(self) -> dict[str, Tensor]:
        return self._state

    @contextmanager
    def out(self) -> Iterator[None]:
        self.remove()
        try:
            yield
        finally:
            self.put_in()

    @torch.no_grad()
    def remove(self) -> None:
        """Put the base model's weights back."""
        for name, module in self._modules.items():
            module.weight.copy_(self._originals[name])

    @torch.no_grad()
    def put_in(self) -> None:
        """Add the low-rank weights."""
        for name, module in self._modules.items():
            a, b = (self._state[name + part].to(module.weight.device, torch.float32) for part in (A, B))
            module.weight.copy_(module.weight.float() + self._scale * (b @ a))


def _linear(model: nn.Module, name: str, state: dict[str, Tensor]) -> nn.Linear:
    """The module of a lora_A, its pair checked."""
    path = name.removesuffix(A)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the LoRA weights are for another model: it has no {path}") from None
    if not isinstance(module, nn.Linear):
        raise ValueError(f"LoRA on {path}, a {type(module).__name__}, cannot be merged; use targets that are nn.Linear")
    if any(module is not other and getattr(other, "weight", None) is module.weight for other in model.modules()):
        raise ValueError(f"LoRA on {path} cannot be merged: its weights are tied to the embeddings; use other targets")
    a, b = state[name], state.get(path + B)
    if b is None or a.ndim != 2 or (*b.shape, *a.shape) != (module.out_features, len(a), len(a), module.in_features):
        found = None if b is None else tuple(b.shape)
        raise ValueError(f"the LoRA weights are damaged: {path} has {tuple(a.shape)} and {found}; train them again")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"the LoRA weights are damaged: {path} holds numbers that are not finite; train them again")
    return module
