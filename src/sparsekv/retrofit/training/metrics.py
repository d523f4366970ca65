"""metrics.jsonl, a progress bar and TensorBoard for whoever watches a run. Of the first process only."""

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsekv.json_lines import Line, append, whole

METRICS_FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"

SCALARS = ("loss", "divergence", "hinge", "fraction", "target", "seconds")
BLOCKS = " ▁▂▃▄▅▆▇█"


class MetricsCallback(TrainerCallback):
    """Appends a line to metrics.jsonl at every `every`-th step and the last, and shows the run.

    Raises ValueError for tensorboard where the package is not installed.
    """

    def __init__(self, output: Path, *, every: int, progress: bool, tensorboard: bool = False) -> None:
        self.path = output / METRICS_FILE
        self.every = every
        self.progress = progress
        self.writer = _writer(output / TENSORBOARD) if tensorboard else None
        self.bar: Any = None
        self.current: dict[str, Any] = {}
        self.started, self.written = 0.0, 0

    def record(self, values: dict[str, Any]) -> None:
        """What the step under way measured."""
        self.current = values

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget lines of steps that will be made again."""
        if not state.is_world_process_zero:
            return
        lines = whole(self.path.read_text()).splitlines() if self.path.exists() else []
        made = (line for line in lines if json.loads(line)["step"] <= state.global_step)
        self.path.write_text("".join(line + "\n" for line in made))
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=not self.progress)
        self.bar.mininterval = 0.5 if sys.stderr.isatty() else 15  # a log file wants a line now and then
        self.started, self.written = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the step's line where it has one; seconds of a step, in the mean since the line before."""
        if not state.is_world_process_zero:
            return
        line = self.current
        if line["step"] % self.every == 0 or line["step"] == state.max_steps:
            self._write(line, on_gpu=args.device.type == "cuda")
        self.bar.set_postfix_str(
            f"target {line['ratio_target']:.2f}x, marked {line['fraction']:.3f} of {line['target']:.3f} "
            f"{blocks(line['fractions'])}, divergence {line['divergence']:.4f}, hinge {line['hinge']:.3f}",
            refresh=False,
        )
        self.bar.update()

    def _write(self, line: dict[str, Any], *, on_gpu: bool) -> None:
        now, step = time.monotonic(), line["step"]
        memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        line = line | {"seconds": round((now - self.started) / (step - self.written), 4), "memory_gib": memory}
        self.started, self.written = now, step
        append(self.path, [line])
        if self.writer is not None:
            for name in SCALARS:
                self.writer.add_scalar(name, line[name], step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()


def total_seconds(lines: Sequence[Line]) -> float:
    """Of all steps. lines: what metrics.jsonl holds, each with the mean of the steps since the one before."""
    steps = [0, *(line["step"] for line in lines)]
    return sum(line["seconds"] * (step - before) for line, (before, step) in zip(lines, pairwise(steps), strict=True))


def blocks(fractions: Sequence[float]) -> str:
    """One block a layer, the higher the more of its tokens are marked."""
    return "".join(BLOCKS[min(int(x * len(BLOCKS)), len(BLOCKS) - 1)] for x in fractions)


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: true needs the package; run pip install 'sparsekv[train]'") from None
    return SummaryWriter(str(folder))
