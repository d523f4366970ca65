"""Training: attention with the gate, forward and backward, beside FlexAttention; and the whole step of a retrofit.

The step is the retrofit's with the base frozen: the teacher's forward, the student's with soft gates, the divergence
over the vocabulary in chunks, the hinge, the backward, the optimiser of the heads, as one CUDA graph but for the last.
Weights are random.

Floating-point operations, per layer: each matrix 2 a number and token in either forward and 2 in the backward, which
needs the inputs' gradient alone; attention 2 products over the triangle forward and 5 backward (7 are computed: scores
twice more); the output head as a matrix. Shares are of a large product of matrices in the same run.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekv import dms
from sparsekv.bench.shapes import Shape
from sparsekv.bench.step import kernel_times, random_model
from sparsekv.bench.timing import median_ms
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attach, heads
from sparsekv.modeling.compiled import compiled_layers
from sparsekv.modeling.split import SplitModel
from sparsekv.ops.gate import gate
from sparsekv.provenance import environment
from sparsekv.retrofit.training.distill import marked_fractions
from sparsekv.retrofit.training.recorded import WARM_UPS, Recorded

WINDOW = 64
TIMED_LAYERS = (4, 8)
"""Of a model too large to train whole: the slope between the two gives the time of a layer."""
WHOLE_BYTES = 2**32
"""Models whose matrices take more in bfloat16 are extrapolated."""
CPU_NOTE = "a CPU run checks that the command works; it measures no target"


def bench_train(
    shape: Shape, *, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, seed: int = 0, kernels: int = 0
) -> dict[str, Any]:
    """Attention and the whole step of `batch` rows of `tokens` tokens. kernels: how many of the longest-running kernels
    of the step to list, where the whole model is timed."""
    torch.manual_seed(seed)
    result = {"bench": "train", "shape": shape.name, "batch": batch, "tokens": tokens, "window": WINDOW}
    peak = matmul_flops(device, dtype)
    result |= {"matmul_tflops": peak / 1e12}
    result["attention"] = bench_attention(shape, batch=batch, tokens=tokens, device=device, dtype=dtype)
    result["step"] = bench_step(shape, batch=batch, tokens=tokens, device=device, dtype=dtype, kernels=kernels)
    for part in (result["step"], *result["attention"]["backends"].values()):
        part["of_matmul"] = part["tflops"] * 1e12 / peak
    note = {} if device.type == "cuda" else {"note": CPU_NOTE}
    return result | {"seed": seed} | note | environment(device)


def bench_attention(
    shape: Shape, *, batch: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One layer's attention by backend: forward, forward with backward, and the memory they take beyond the inputs."""
    dim = shape.head_dim
    q, k, v, grad = (
        torch.randn(batch, tokens, n, dim, device=device, dtype=dtype).transpose(1, 2)
        for n in (shape.query_heads, shape.kv_heads, shape.kv_heads, shape.query_heads)
    )
    log_keep = torch.nn.functional.logsigmoid(3 * torch.randn(batch, shape.kv_heads, tokens, device=device))
    leaves = [x.requires_grad_() for x in (q, k, v, log_keep)]
    backends = {}
    for backend in ("triton", "flex") if device.type == "cuda" else ("reference",):

        def forward(backend: str = backend) -> Tensor:
            return gate(q, k, v, log_keep, window=WINDOW, scale=dim**-0.5, backend=backend)

        def both(forward: Callable[[], Tensor] = forward) -> None:
            torch.autograd.grad(forward(), leaves, grad)

        ms, peak = median_ms(both, device), _peak_bytes(both, device)
        flops = 7 * _product_flops(shape, batch, tokens)
        backends[backend] = {
            "forward_ms": median_ms(forward, device),
            "ms": ms,
            "tflops": flops / ms / 1e9,
            "peak_bytes": peak,
        }
    found: dict[str, Any] = {"backends": backends}
    if "flex" in backends:
        found["speedup"] = backends["flex"]["ms"] / backends["triton"]["ms"]
    return found


def bench_step(
    shape: Shape, *, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, kernels: int = 0
) -> dict[str, Any]:
    """Milliseconds of a whole step, timed or, for a large model, extrapolated from two smaller depths."""
    torch.compiler.reset()  # another shape's graphs would count towards the limit of each layer's code
    whole = 2 * shape.layers * shape.layer_weights <= WHOLE_BYTES
    timed = {
        layers: _timed_step(
            replace(shape, layers=layers), batch, tokens, device=device, dtype=dtype, kernels=kernels if whole else 0
        )
        for layers in ((shape.layers,) if whole else TIMED_LAYERS)
    }
    few, many = min(timed), max(timed)
    ms = timed[few]["ms"]
    if not whole:
        ms += (timed[many]["ms"] - ms) / (many - few) * (shape.layers - few)
    flops = step_flops(shape, batch=batch, tokens=tokens)
    return {
        "ms": ms,
        "tokens_per_s": 1e3 * batch * tokens / ms,
        "tflops": flops / ms / 1e9,
        "extrapolated_from_layers": None if whole else list(timed),
        "timed": [{"layers": layers} | found for layers, found in timed.items()],
    }


def step_flops(shape: Shape, *, batch: int, tokens: int, trained: bool = False) -> int:
    """Floating-point operations of a whole step; trained: the weights too, whose gradient takes 2 a number and token
    more."""
    each = (8 if trained else 6) * batch * tokens
    return (
        shape.layers * (each * shape.layer_weights + 9 * _product_flops(shape, batch, tokens))
        + each * shape.vocabulary * shape.hidden
    )


def _timed_step(
    shape: Shape, batch: int, tokens: int, *, device: torch.device, dtype: torch.dtype, kernels: int
) -> dict[str, Any]:
    model = random_model(shape, context=tokens, device=device, dtype=dtype)
    attach(model, policy="dms", window=WINDOW)
    ids = torch.randint(0, shape.vocabulary, (batch, tokens), device=device)
    with contexts.dense(model):
        split = SplitModel(model)
    trained = [p for head in heads(model) for p in head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    with compiled_layers(model), contexts.soft(model, tau=0.1) as gates:

        def work(ids: Tensor) -> dict[str, Tensor]:
            with contexts.dense(model), torch.no_grad():
                teacher = split.hidden(ids)
            loss = split.divergence(teacher, split.hidden(ids), dms.kl_teacher_student)
            loss = loss + dms.hinge(marked_fractions(gates.gates, hard=False).mean(), 0.5)
            loss.backward()
            return {}

        def step(forward_backward: Callable[..., Any]) -> None:
            gates.begin(seed=0)
            forward_backward(ids=ids)
            optimizer.step()
            optimizer.zero_grad()

        step(work)  # compiles
        found: dict[str, Any] = {"peak_bytes": _peak_bytes(partial(step, work), device)}  # a replay allocates nothing
        run = partial(step, Recorded(work, trained) if device.type == "cuda" else work)
        for _ in range(WARM_UPS + 1):
            run()
        found["ms"] = median_ms(run, device, repeats=5)
        if kernels and device.type == "cuda":
            found["kernels"] = kernel_times(run, most=kernels, steps=2)
    return found


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large product of matrices: the roofline of training."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2e3 * size**3 / median_ms(lambda: a @ b, device)


def _product_flops(shape: Shape, batch: int, tokens: int) -> int:
    """One product of attention over the triangle of visible pairs."""
    return batch * shape.query_heads * shape.head_dim * tokens * tokens


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a run takes beyond what is held before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before
