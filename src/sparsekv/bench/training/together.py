"""A training step by several processes beside one: `sparsekv bench train --processes 2`.

Each measurement is processes of its own (together_process), started as a user starts a retrofit. One that fails, or
takes too long, is a line that says so, and the next one goes on.
"""

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sparsekv.bench.shapes import Shape
from sparsekv.bench.training.launch import command_of, last_words, start

MODULE = "sparsekv.bench.training.together_process"
FIRST = [("alone", "heads"), ("alone", "all")]
"""Side by side, each on a GPU of its own."""
SECOND = [("shards", "all"), ("shards", "heads"), ("halves", "heads")]
SECONDS = 200
"""That one measurement may take, with its start."""

Keep = Callable[[dict[str, Any]], None]


def bench_together(
    shape: Shape, *, processes: int, batch: int, tokens: int, seed: int, keep: Keep, commit: str | None = None
) -> None:
    """Hand a result to `keep` as each is measured, of `batch` rows of `tokens` tokens a model; shards need GPUs.

    Raises ValueError where the machine has GPUs, and fewer than processes.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ValueError(f"{processes} processes need a GPU each and PyTorch sees {gpus}; use --processes {gpus}")

    def measure(way: str, trainable: str, gpu: int = 0) -> None:
        about = {"bench": "train together", "shape": shape.name, "way": way, "trainable": trainable}
        about |= {"processes": 1 if way == "alone" else processes, "tokens": tokens, "seed": seed}
        about |= {"rows": batch * about["processes"] if way == "shards" else batch}

        def fill(line: dict[str, Any]) -> None:
            keep(about | line | ({"commit": commit} if commit else {}))

        with tempfile.TemporaryDirectory() as folder:
            spec = about | {"batch": batch, "folder": folder}
            failure = _run(spec, way, Path(folder), processes=processes, gpu=gpu if gpus else None, keep=fill)
        if failure is not None:
            fill({"layers": shape.layers, "extrapolated_from": None, "error": failure})

    with ThreadPoolExecutor(max(1, min(gpus, len(FIRST)))) as pool:
        list(pool.map(measure, *zip(*FIRST, strict=True), range(len(FIRST))))
    for way, trainable in SECOND:
        if way != "shards" or gpus:
            measure(way, trainable)


def _run(spec: dict[str, Any], way: str, folder: Path, *, processes: int, gpu: int | None, keep: Keep) -> str | None:
    """Why it failed, or None."""
    log, lines, seen = folder / "log", folder / "lines.jsonl", 0

    def tell() -> bool:
        nonlocal seen
        found = lines.read_text(encoding="utf-8").splitlines(keepends=True) if lines.exists() else []
        for line in found[seen:]:
            if line.endswith("\n"):
                keep(json.loads(line))
                seen += 1
        return False

    command = command_of(way, MODULE, [json.dumps(spec)], processes=processes, gpus=gpu is not None)
    environment = {"CUDA_VISIBLE_DEVICES": str(gpu)} if way == "alone" and gpu is not None else {}
    try:
        code = start(command, log, seconds=SECONDS, environment=environment, until=tell)
    except TimeoutError as error:
        return f"{error}: {last_words(log)}"
    finally:
        tell()
    return None if code == 0 else f"exit code {code}: {last_words(log)}"
