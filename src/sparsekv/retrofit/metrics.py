"""metrics.jsonl: one line a step, and a progress bar for whoever watches."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS_FILE = "metrics.jsonl"


class MetricsCallback(TrainerCallback):
    """Appends a line to metrics.jsonl at every step, and shows the run."""

    def __init__(self, path: Path, *, progress: bool) -> None:
        self.path = path
        self.progress = progress
        self.bar: Any = None
        self.current: dict[str, Any] = {}
        self.started = 0.0

    def record(self, values: dict[str, Any]) -> None:
        """What the step under way measured."""
        self.current = values

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget lines of steps that will be made again."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.write_text("".join(line + "\n" for line in lines[: state.global_step]))
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=not self.progress)
        self.bar.mininterval = 0.5 if sys.stderr.isatty() else 15  # a log file wants a line now and then
        self.started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the step's line; seconds from the end of the previous step."""
        now = time.monotonic()
        memory = torch.cuda.max_memory_allocated() / 2**30 if args.device.type == "cuda" else None
        line = self.current | {"seconds": round(now - self.started, 4), "memory_gib": memory}
        self.started = now
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(
            f"target {line['ratio_target']:.2f}x, marked {line['fraction']:.3f} of {line['target']:.3f}, "
            f"divergence {line['divergence']:.4f}",
            refresh=False,
        )
        self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.bar.close()
