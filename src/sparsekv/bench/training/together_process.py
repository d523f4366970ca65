"""One process of together: python -m sparsekv.bench.training.together_process SPEC, a JSON object; the first of them
appends its results to folder/lines.jsonl.

The step is the retrofit's own loss (retrofit.distill) with its backward, clipping and optimiser. Heads alone: weights
in bfloat16, the base its own teacher. All weights: in float32 with bfloat16 products, from a second, bfloat16 model,
each layer computed again in the backward. A model that does not fit is a line that says so, and is timed at two depths,
of which a line gives the whole.
"""

import gc
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from sparsekv.bench.shapes import Shape, shape_of
from sparsekv.bench.step import random_model
from sparsekv.bench.timing import median_ms
from sparsekv.bench.training.train import CPU_NOTE, TIMED_LAYERS, WINDOW, matmul_flops, step_flops
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attach
from sparsekv.modeling.compiled import compiled_layers
from sparsekv.provenance import environment
from sparsekv.retrofit.config import RetrofitConfig, parse_config
from sparsekv.retrofit.training.distill import Distillation, Draw
from sparsekv.retrofit.training.trainer import make_trainable

Line = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Measure what the specification says."""
    spec = json.loads(arguments[0])
    cpu = not torch.cuda.is_available()
    state = PartialState(cpu=cpu)
    device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float32 if cpu else torch.bfloat16
    shape, peak = shape_of(spec["shape"]), matmul_flops(device, dtype)
    config = config_of(spec)

    def keep(line: Line) -> None:
        if state.is_main_process:
            note = {"note": CPU_NOTE} if cpu else {}
            with (Path(spec["folder"]) / "lines.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"extrapolated_from": None} | line | note | environment(device)) + "\n")

    def measured(layers: int) -> Line:
        begun = time.monotonic()
        found = timed_step(replace(shape, layers=layers), spec, config, device=device, dtype=dtype)
        return {"layers": layers, **found, **speeds(replace(shape, layers=layers), spec, found["ms"], peak)} | {
            "wall_s": round(time.monotonic() - begun, 1)
        }

    try:
        keep(measured(shape.layers))
    except torch.OutOfMemoryError as error:
        keep({"layers": shape.layers, "error": f"does not fit: {str(error).partition('. ')[0]}"})
        too_large = True
    else:
        too_large = False
    if too_large:  # out of the clause, whose traceback holds tensors
        few, many = (measured(layers) for layers in TIMED_LAYERS)
        keep(few)
        keep(many)
        keep(extrapolated(shape, spec, few, many, peak=peak))
    state.wait_for_everyone()
    state.destroy_process_group()
    return 0


def config_of(spec: Line) -> RetrofitConfig:
    """The retrofit's configuration of one measurement."""
    rows = max(spec["tokens"], 2 * WINDOW + 1)
    return parse_config(
        {
            "model": spec["shape"],
            "output": spec["folder"],
            "data": [{"kind": "text", "names": ["encyclopedia"]}],
            "trainable": spec["trainable"],
            "tensor_parallel": spec["processes"] if spec["way"] == "halves" else 1,
            "gradient_checkpointing": spec["trainable"] == "all",
            "window": WINDOW,
            "length": rows,
            "batch": spec["rows"],
        }
    )


def timed_step(shape: Shape, spec: Line, config: RetrofitConfig, *, device: torch.device, dtype: torch.dtype) -> Line:
    """Milliseconds, and the peak of allocated bytes of the process that has the highest, weights included."""
    gc.collect()
    torch.manual_seed(spec["seed"])  # the same weights in every process
    student, teacher = models_of(shape, spec, config, device=device, dtype=dtype)
    attach(student, policy="dms", window=WINDOW)
    with ExitStack() as stack:
        stack.enter_context(contexts.soft(student, tau=config.tau))
        make_trainable(student, config)
        if teacher is not None:
            teacher.requires_grad_(False)
        made: Any = Distillation(student, config, teacher=teacher)
        trained = [p for p in made.parameters() if p.requires_grad]
        optimizer: Any = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=device.type == "cuda")
        if spec["way"] == "shards":
            made, optimizer = Accelerator().prepare(made, optimizer)
            trained = [p for p in made.parameters() if p.requires_grad]
        part = dist.get_rank() if spec["way"] == "shards" else 0
        draw = Draw(seed=spec["seed"], target=0.5, part=part, parts=spec["rows"] // spec["batch"])
        ids = torch.randint(0, shape.vocabulary, (spec["batch"], config.length), device=device)

        def step() -> None:
            made.train()(ids, draw)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            optimizer.zero_grad()

        stack.enter_context(compiled_layers(student))
        step()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ms = median_ms(step, device, warmup=2, repeats=5)
        peak = torch.tensor(float(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0), device=device)
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {"ms": ms, "peak_bytes": int(peak) or None}


def models_of(
    shape: Shape, spec: Line, config: RetrofitConfig, *, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """(student, teacher or None), random. Halves are read from a file, as Transformers makes them."""
    if spec["way"] == "halves":
        folder = Path(spec["folder"]) / f"{shape.layers}"
        if dist.get_rank() == 0:
            random_model(shape, context=config.length, device=device, dtype=dtype).save_pretrained(folder)
        PartialState().wait_for_everyone()
        shared = DistributedConfig(tp_size=spec["processes"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=shared)
        torch.manual_seed(spec["seed"])
        return model.eval().requires_grad_(False), None
    if spec["trainable"] == "heads":
        return random_model(shape, context=config.length, device=device, dtype=dtype), None
    student = random_model(shape, context=config.length, device=device, dtype=torch.float32)
    return student, random_model(shape, context=config.length, device=device, dtype=dtype)


def speeds(shape: Shape, spec: Line, ms: float, peak: float) -> Line:
    """Of a GPU, whose share of the operations is the same as every other's."""
    flops = step_flops(shape, batch=spec["rows"], tokens=spec["tokens"], trained=spec["trainable"] == "all")
    each = flops / spec["processes"] / ms / 1e9
    tokens = 1e3 * spec["rows"] * spec["tokens"] / ms
    return {"tokens_per_s": tokens, "tflops": each, "of_matmul": each * 1e12 / peak, "matmul_tflops": peak / 1e12}


def extrapolated(shape: Shape, spec: Line, few: Line, many: Line, *, peak: float) -> Line:
    """The whole model on the line through two depths, in time; no memory, since it does not fit."""
    slope = (many["ms"] - few["ms"]) / (many["layers"] - few["layers"])
    ms = few["ms"] + slope * (shape.layers - few["layers"])
    depths = [few["layers"], many["layers"]]
    found = {"layers": shape.layers, "extrapolated_from": depths, "ms": ms, "peak_bytes": None}
    return found | speeds(shape, spec, ms, peak)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
