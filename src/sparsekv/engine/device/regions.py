"""The model's forward with its decoder layers compiled: one layer is compiled once, and every layer runs that code.

Transformers' forward runs as it is; while it does, each decoder layer, and what stands beside them (the rotation, the
last norm), goes through a compiled function that takes the module as an argument. Nothing that differs between layers,
engines or processes is written into compiled code, so it is shared by the first and kept on disk for the last: the
opaque operations in it ask which cache, layer and workspace are those of the forward under way.

Sizes are dynamic and 0 and 1 are not (torch.compile's rule), so a single token is computed twice. One compilation then
serves decode steps and chunks of any size.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv.engine.device.cache import EngineCache
from sparsekv.engine.device.products import product, workspace_of
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.attached import ATTACHED, AttachedLayer, PagedCache

KINDS = 64
"""Compilations of one function: layers that differ (windows, rotations) are compiled one by one."""

_UNDER_WAY: ContextVar["CompiledForward | None"] = ContextVar("forward", default=None)
_PATCHING = threading.RLock()
"""Held while a forward's modules go through compiled code, so that two engines over one model take turns."""


class CompiledForward:
    """(ids int64 [1, T], positions int64 [1, T]) -> logits [T, vocab], or of the tokens `keep`, int64 [n].

    model: attached; cache: whose `parts` say what the forward holds; workspace: ops.linear's; backend: torch.compile's.
    Graphs of this forward read `workspace`, so they must not outlive it.
    """

    def __init__(self, model: Any, cache: EngineCache, *, workspace: Tensor, backend: Any) -> None:
        self.model = model
        self.cache = cache
        self.workspace = workspace
        self.layer = -1
        """The layer under way."""
        self._opaque = OpaqueCache(len(attachment_of(model).layers))
        self._layers = _decoder_layers(model)
        run = _compiled(backend)
        self._runs: list[tuple[nn.Module, int, Callable[..., Any]]] = [(m, i, run) for i, m in self._layers.items()]
        self._runs += [(module, -1, _compiled(backend)) for module in _beside_layers(model)]

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, keep: Tensor | None = None) -> Tensor:
        count = ids.shape[1]
        if count == 1:
            ids, positions = ids.repeat(1, 2), positions.repeat(1, 2)
        ids, positions = ids[0][None], positions[0][None]  # strides are guarded, of a view of a buffer too
        with self._running():
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=self._opaque,
                use_cache=True,
                logits_to_keep=slice(0, count) if keep is None else keep,
            )
        return out.logits[0]

    @contextmanager
    def _running(self) -> Iterator[None]:
        head = self.model.get_output_embeddings()
        with _PATCHING, torch._dynamo.config.patch(recompile_limit=KINDS), workspace_of(self.workspace):
            before = [(module, vars(module).get("forward")) for module, *_ in self._runs] + [
                (head, vars(head).get("forward"))
            ]
            for module, layer, run in self._runs:
                module.forward = self._through(module, layer, run)
            if type(head) is nn.Linear and head.bias is None:
                head.forward = self._through(head, -1, _head)
            token = _UNDER_WAY.set(self)
            try:
                yield
            finally:
                _UNDER_WAY.reset(token)
                for module, forward in before:
                    vars(module).pop("forward", None)
                    if forward is not None:
                        module.forward = forward

    def _through(self, module: nn.Module, layer: int, run: Callable[..., Any]) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if _UNDER_WAY.get() is not self:  # another thread runs the plain model
                return original(*args, **kwargs)
            self.layer = layer
            _mark(args, kwargs)
            return run(module, args, kwargs)

        return forward


class OpaqueCache(PagedCache):
    """What compiled layers see of a cache: nothing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Leaves layer_idx unread: reading it would make each layer's code its own."""
        return key_states, value_states

    def attend(
        self,
        attached: AttachedLayer,
        hidden: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        return torch.ops.sparsekv.attend_under_way(*qkv, hidden, scale)


@torch.library.custom_op("sparsekv::attend_under_way", mutates_args=())
def attend_under_way(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """EngineCache.attend_packed for the layer under way. It writes to the cache, which the compiler does not see. A
    token that no part of the forward holds gets 0."""
    forward = _UNDER_WAY.get()
    assert forward is not None, "compiled layers run inside a CompiledForward alone"
    out = forward.cache.attend_packed(forward.layer, hidden, (q, k, v), scale)
    if out.shape[1] < q.shape[2]:
        out = nn.functional.pad(out, (0, 0, 0, 0, 0, q.shape[2] - out.shape[1]))
    # Contiguous, as the fake below promises the compiler; the kernels' outputs are so already.
    return out.contiguous()


@attend_under_way.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _module(module: Any, args: Any, kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _head(module: nn.Linear, args: tuple[Tensor], kwargs: dict[str, Any]) -> Tensor:
    return product(*args, module.weight)


def _compiled(backend: Any) -> Callable[..., Any]:
    """_module, compiled, with a code object of its own: Dynamo counts and keeps compilations by code object, so this
    way they are the engine's, and go with it."""
    own = FunctionType(_module.__code__.replace(), _module.__globals__, _module.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)


def _mark(args: Any, kwargs: Any) -> None:
    """Sizes of tensors [1, T, ...] are dynamic in T: of arguments, and of pairs of them (the rotation's)."""
    given = (*args, *kwargs.values())
    for x in (*given, *(y for pair in given if type(pair) is tuple for y in pair)):
        if isinstance(x, Tensor) and x.ndim > 1 and x.shape[0] == 1 and not hasattr(x, "_dynamo_dynamic_indices"):
            torch._dynamo.mark_dynamic(x, 1)


def _decoder_layers(model: Any) -> dict[int, nn.Module]:
    """Attention layer's number -> the decoder layer that holds it."""
    found = {}
    for layer in model.get_decoder().layers:
        inside = [getattr(module, ATTACHED).layer for module in layer.modules() if hasattr(module, ATTACHED)]
        found |= dict.fromkeys(inside, layer)
    return found


def _beside_layers(model: Any) -> list[nn.Module]:
    """What runs once a forward: the rotation and the last norm, but not the embedding."""
    return [m for m in model.get_decoder().children() if not isinstance(m, nn.ModuleList | nn.Embedding)]
