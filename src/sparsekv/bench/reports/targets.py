"""What the measurements were aimed at, and another engine's published figures, beside a results file of bench.suite."""

from typing import Any

Row = dict[str, Any]

VLLM = {
    ("qwen3-8b", 1, 8192): (7.17, None),
    ("qwen3-8b", 8, 8192): (10.16, 8.83),
    ("qwen3-8b", 32, 8192): (19.76, 14.40),
    ("qwen3-8b", 8, 32768): (19.65, 14.20),
    ("llama-3.2-1b", 1, 8192): (1.62, None),
    ("llama-3.2-1b", 8, 8192): (2.61, None),
}
"""Shape, batch, context -> ms of a decode step of vLLM 0.26.0 with BF16 and with FP8 keys and values. Constants,
measured before this project on the same kind of H100 (dummy weights, CUDA graphs, FlashAttention)."""

LARGE, SMALL = "qwen3-8b", "llama-3.2-1b"
AIMED_STEPS = [(8, 32768), (32, 8192), (64, 4096), (1, 8192)]


def find(rows: list[Row], bench: str, **values: Any) -> Row:
    """The one row of that benchmark with these values. Raises ValueError where the file lacks it."""
    found = [r for r in rows if r["bench"] == bench and all(r[key] == value for key, value in values.items())]
    if len(found) != 1:
        wanted = ", ".join(f"{key} {value}" for key, value in values.items())
        raise ValueError(f"the results hold {len(found)} rows of {bench} at {wanted}; measure them with bench.suite")
    return found[0]


def size(batch: int, context: int) -> str:
    """8 and 32768 -> '8 x 32K'."""
    return f"{batch} x {context // 1024}K"


def against_targets(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """(what, aimed at, measured, 'met' or 'missed') for every target."""
    return [*_kernels(rows), *_steps(rows), *_rival(rows), *_training(rows)]


def _most(what: str, aim: float, measured: float, form: str = "{:.3f}x") -> tuple[str, str, str, str]:
    return what, f"{form.format(aim)} or less", form.format(measured), "met" if measured <= aim else "missed"


def _least(what: str, aim: float, measured: float, form: str = "{:.3f}x") -> tuple[str, str, str, str]:
    return what, f"{form.format(aim)} or more", form.format(measured), "met" if measured >= aim else "missed"


def _kernels(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    def decode(batch: int, context: int) -> Row:
        return find(rows, "decode", batch=batch, context=context)

    def prefill(tokens: int, ratio: float) -> float:
        return find(rows, "prefill", tokens=tokens, ratio=ratio)["speedup"]

    name = "decode kernel, {} live, of copy bandwidth"
    wide = [(32, 32768, 0.88), (8, 262144, 0.88), (8, 32768, 0.70)]
    return [
        *(_least(name.format(size(b, c // 8)), aim, decode(b, c)["of_copy"], "{:.1%}") for b, c, aim in wide),
        _most("decode kernel, 1 x 4K live", 25, decode(1, 32768)["us"], "{:.1f} us"),
        _least("prefill attention at 8K, ratio 8, against cuDNN", 1, prefill(8192, 8)),
        _least("prefill attention at 32K, ratio 8, against cuDNN", 3, prefill(32768, 8)),
        _least("prefill attention at 8K, ratio 1, against cuDNN", 0.7, prefill(8192, 1)),
        _least("prefill attention at 32K, ratio 1, against cuDNN", 0.7, prefill(32768, 1)),
    ]


def _steps(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    def step(shape: str, batch: int, context: int, ratio: float) -> Row:
        return find(rows, "step", shape=shape, batch=batch, context=context, ratio=ratio)

    out = []
    for ratio, name in ((8, "step at ratio 8"), (1, "dense step in this engine")):
        for batch, context in AIMED_STEPS:
            over = step(LARGE, batch, context, ratio)["over_roofline"]
            out.append(_most(f"{name}, {size(batch, context)}, over all weights + live KV", 1.2, over))
    for batch, context in AIMED_STEPS[:2]:
        row = step(LARGE, batch, context, 8)
        of_dense = row["ms"] / row["dense_roofline_ms"]
        out.append(_most(f"step at ratio 8, {size(batch, context)}, over the dense roofline", 1, of_dense))
    small = step(SMALL, 8, 8192, 8)["over_roofline"]
    out.append(_most("Llama-3.2-1B shape, 8 x 8K, ratio 8, over its roofline", 1.5, small))
    out.append(_marks(step(LARGE, 8, 32768, 8)))
    used = step(LARGE, 8, 32768, 8)["used_over_live_kv_bytes"]
    out.append(_most("KV bytes used over live, 4K live tokens a head", 1.05, used, "{:.3f}x"))
    return out


def _marks(step: Row) -> tuple[str, str, str, str]:
    """One kernel a layer makes the marks and places the token."""
    share = sum(k["ms"] for k in step["kernels"] if k["kernel"] == "_place_one") / step["ms"]
    where = size(step["batch"], step["context"])
    return _most(f"marks and placement, {where}, of the step", 0.05, share, "{:.1%}")


def _rival(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    aims = [
        (LARGE, 8, 32768, 2.2, 1.6),
        (LARGE, 32, 8192, 2.2, 1.6),
        (LARGE, 8, 8192, 1.4, None),
        (LARGE, 1, 8192, 1.0, None),
        (SMALL, 8, 8192, 1.7, None),
    ]
    out = []
    for shape, batch, context, *wanted in aims:
        ms = find(rows, "step", shape=shape, batch=batch, context=context, ratio=8)["ms"]
        for kind, aim, theirs in zip(("BF16", "FP8"), wanted, VLLM[shape, batch, context], strict=True):
            if aim is not None and theirs is not None:
                out.append(_least(f"{shape}, {size(batch, context)}, ratio 8, against vLLM {kind}", aim, theirs / ms))
    for (shape, batch, context), (theirs, _) in VLLM.items():
        if shape == LARGE:
            ms = find(rows, "step", shape=shape, batch=batch, context=context, ratio=1)["ms"]
            out.append(_most(f"dense in this engine, {size(batch, context)}, over vLLM BF16", 1.1, ms / theirs))
    return out


def _training(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    speedup = find(rows, "train", shape=LARGE)["attention"]["speedup"]
    return [_least("training attention with the gate, 8K tokens, against FlexAttention", 1.3, speedup)]
