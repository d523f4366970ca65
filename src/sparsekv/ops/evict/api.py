"""evict: which slot a decoded token takes of a head that holds its budget, and what is remembered of the token.

H2O (arXiv 2306.14048) takes the least important slot, TOVA (arXiv 2401.06104) the one least important to all heads
together, the control of arXiv 2609.03430 one by chance. Of equals the first slot goes.

What is remembered of slots is [P + 1, C] (cache.state): by page and place, index P for nobody. rows: int64 [B],
distinct, -1 for padded places, which choose -1 and write nothing. seen: int32 [B], tokens of each sequence before the
step.
Without a backend's name, Triton runs on CUDA, the reference elsewhere; the kernels never wait for the device.

All raise ValueError where a tensor does not fit the cache, or the backend asked for is unknown or cannot run.
"""

from types import ModuleType

from torch import Tensor

from sparsekv.ops.evict import reference
from sparsekv.ops.layout import LayerPages, check_backend

BACKENDS = ("reference", "triton")


def least_important(
    layer: LayerPages,
    rows: Tensor,
    weight: Tensor,
    born: Tensor,
    *,
    seen: Tensor,
    safe: int,
    budget: int,
    backend: str | None = None,
) -> Tensor:
    """int32 [B, H]: where a head holds `budget` slots or more, the one of the least weight among the first `budget`
    that were born at seen - safe or before; else -1.

    weight: float [P + 1, C]; born: int32 [P + 1, C], the position of a slot's token.
    """
    _check_slots(layer, weight=weight, born=born)
    return _run(backend, layer).least_important(layer, rows, weight, born, seen, safe, budget)


def at_random(
    layer: LayerPages,
    rows: Tensor,
    born: Tensor,
    prompt: Tensor,
    prompt_tokens: Tensor,
    *,
    seen: Tensor,
    samples: Tensor,
    seed: int,
    layer_index: int,
    recent: int,
    budget: int,
    backend: str | None = None,
) -> Tensor:
    """int32 [B, H]: where a head holds `budget` slots or more, one of the first `budget` by chance; else -1.

    Candidates were born at seen - recent or before and are not of the prompt, unless prompt and recent window do not
    fit in the budget together. Of n candidates, in slot order, the floor(u * n)-th goes, with u = noise.uniform(seed,
    sample, layer_index, head, seen).

    prompt: bool [P + 1, C], whether a slot's token is of the prompt; prompt_tokens: int32 [R + 1], samples: int64
    [R + 1], by row; seed: in [0, 2^63).
    """
    _check_slots(layer, born=born, prompt=prompt)
    key = {"samples": samples, "seed": seed, "layer_index": layer_index}
    return _run(backend, layer).at_random(
        layer, rows, born, prompt, prompt_tokens, seen=seen, recent=recent, budget=budget, **key
    )


def least_shared(
    layer: LayerPages, rows: Tensor, weights: Tensor, victim: Tensor, *, backend: str | None = None
) -> None:
    """Write to victim int64 [R + 1], by row, the slot whose weights [B, H, W] are least when summed over heads.

    All heads of a row hold the same slots.
    """
    if weights.shape[:2] != (rows.shape[0], layer.lengths.shape[1]):
        raise ValueError(f"weights are {tuple(weights.shape)}; expected [{len(rows)}, {layer.lengths.shape[1]}, any]")
    _run(backend, layer).least_shared(layer, rows, weights, victim)


def when_full(layer: LayerPages, rows: Tensor, victim: Tensor, *, budget: int, backend: str | None = None) -> Tensor:
    """int32 [B, H]: the row's victim (int64 [R + 1]) where a head holds `budget` slots or more; else -1."""
    return _run(backend, layer).when_full(layer, rows, victim, budget)


def record(
    layer: LayerPages,
    rows: Tensor,
    slots: Tensor,
    born: Tensor,
    *,
    seen: Tensor,
    weight: Tensor | None = None,
    prompt: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """After a decode step's `place`: the slot that the token took is born at `seen`, weighs 0 and is not of the prompt.

    slots: int32 [B, H], as `place` was given them: the newest slot where it is -1. born, weight, prompt: as above,
    written in place. A slot that the page table has no room for writes nothing.
    """
    _check_slots(layer, born=born, **{k: x for k, x in (("weight", weight), ("prompt", prompt)) if x is not None})
    _run(backend, layer).record(layer, rows, slots, born, seen, weight, prompt)


def _check_slots(layer: LayerPages, **states: Tensor) -> None:
    shape = (layer.kv.shape[0] + 1, layer.page_size)
    for name, state in states.items():
        if state.shape != shape or not state.is_contiguous():
            raise ValueError(f"{name} is {tuple(state.shape)}; this cache needs {shape}, contiguous")


def _run(backend: str | None, layer: LayerPages) -> ModuleType:
    """The implementation that runs."""
    if check_backend(backend, layer.kv.device, BACKENDS) == "triton":
        from sparsekv.ops.evict import triton

        return triton
    return reference
