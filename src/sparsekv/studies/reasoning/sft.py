"""Fine-tuning of all weights on the chains, on one device, resumable.

L = mean over the chains' tokens of -log p(token | its chain so far), rows packed, chains kept apart by ops.gate. On a
GPU the weights that run are bfloat16, as they will be served; AdamW moves float32 masters of them.

OUT/checkpoints  until it is done      OUT/metrics.jsonl  a line every 25 steps
OUT/config.json, model.safetensors ... the model, a Transformers folder with the chat template of chats.py
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig

from sparsekv.json_lines import append, read_lines
from sparsekv.modeling.attach import attach, detach
from sparsekv.modeling.compiled import compiled_layers
from sparsekv.modeling.load import load_model
from sparsekv.modeling.split import SplitModel
from sparsekv.ops.transfer import upload
from sparsekv.retrofit.training import checkpoint
from sparsekv.retrofit.training.recorded import Recorded
from sparsekv.studies.reasoning import data
from sparsekv.studies.reasoning.chats import TEMPLATE
from sparsekv.studies.reasoning.config import ReasoningConfig
from sparsekv.studies.reasoning.rows import IGNORE, Batch, batches
from sparsekv.studies.runner import Say

METRICS, CONFIG = "metrics.jsonl", "reasoning.json"
EVERY = 25
CHUNK = 8192
"""Positions whose logits are made at once."""


def train(config: ReasoningConfig, chains: Path, out: Path, *, seconds: float, say: Say) -> bool:
    """Make or go on with the model in `out`; stops after so many seconds, with a checkpoint. Whether it is complete.

    Raises ValueError for data that is not there, another run's folder, or a loss that is not finite.
    """
    if (out / "config.json").exists():
        say(f"{out} holds the finished model")
        return True
    _claim(config, out)
    masters, tokenizer = load_model(config.model, dtype=torch.float32)
    on_gpu = masters.device.type == "cuda"
    optimizer = torch.optim.AdamW(masters.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)
    step = _resume(masters, optimizer, out)
    working: Any = copy.deepcopy(masters)
    if on_gpu:
        working.to(torch.bfloat16)
    attach(working, policy="dense")
    rows = batches(data.read(chains), batch=config.batch, length=config.length, seed=config.seed, start=step)
    step = _steps(config, (masters, working), optimizer, rows, out, step=step, seconds=seconds, say=say)
    if step < config.steps:
        say(f"Stopped after step {step} of {config.steps}; the same command goes on")
        return False
    detach(working)
    _save(working.to(torch.bfloat16), tokenizer, out)
    shutil.rmtree(out / checkpoint.CHECKPOINTS, ignore_errors=True)
    say(f"Done: {out}")
    return True


def rate(config: ReasoningConfig, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * min((step + 1) / config.warmup, cosine) if config.warmup else config.lr * cosine


def _steps(
    config: ReasoningConfig,
    models: tuple[Any, Any],
    optimizer: torch.optim.Optimizer,
    rows: Iterator[Batch],
    out: Path,
    *,
    step: int,
    seconds: float,
    say: Say,
) -> int:
    """Train from `step`; returns the step it came to, with a checkpoint of it unless it is the last."""
    masters, working = models
    device, started, first = working.device, time.monotonic(), step
    split = SplitModel(working)
    loss_of = torch.compile(_loss) if device.type == "cuda" else _loss
    pairs = list(zip(masters.parameters(), working.parameters(), strict=True))
    own = [master for master, _ in pairs]
    working.train()

    def work(tokens: Tensor, labels: Tensor, documents: Tensor) -> dict[str, Tensor]:
        hidden = split.hidden(tokens, documents=documents).flatten(0, 1)
        parts = zip(hidden.split(CHUNK), labels.flatten().split(CHUNK), strict=True)
        total = torch.stack([loss_of(h, split.head.weight, y) for h, y in parts]).sum()
        loss = total / (labels != IGNORE).sum().clamp(min=1)
        loss.backward()
        return {"loss": loss.detach()}

    forward_backward = Recorded(work, [run for _, run in pairs]) if device.type == "cuda" else work
    with compiled_layers(working):
        while step < config.steps:
            tokens, labels, documents = _moved(next(rows), device)
            loss = forward_backward(tokens=tokens, labels=labels, documents=documents)["loss"]
            for master, run in pairs:
                master.grad = None if run.grad is None else run.grad.float()
                run.grad = None
            norm = torch.nn.utils.clip_grad_norm_(own, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate(config, step)
            optimizer.step()
            with torch.no_grad():
                for master, run in pairs:
                    run.copy_(master)
            step += 1
            over = False
            if step % EVERY == 0 or step - first in (1, 3) or step == config.steps:
                line = _line(config, step, first, loss=loss.item(), norm=norm.item(), started=started)
                append(out / METRICS, [line])
                say(json.dumps(line))
                over = time.monotonic() - started > seconds
            if step < config.steps and (over or step % config.save_every == 0):
                _keep(masters, optimizer, out, step)
            if over:
                break
    return step


def _moved(batch: Batch, device: torch.device) -> Batch:
    """To the device, without waiting for what runs there."""
    tokens, labels, documents = (upload(x, x.dtype, device) for x in batch)
    return tokens, labels, documents


def _loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The sum over what is learned. hidden: [N, hidden]; head: [vocab, hidden]; labels: int64 [N]."""
    return functional.cross_entropy(
        functional.linear(hidden, head).float(), labels, ignore_index=IGNORE, reduction="sum"
    )


def _line(
    config: ReasoningConfig, step: int, first: int, *, loss: float, norm: float, started: float
) -> dict[str, Any]:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is not finite at step {step}: lower lr ({config.lr:g}) and name a new folder")
    spent = time.monotonic() - started
    tokens = config.batch * config.length
    return {
        "step": step,
        "loss": round(loss, 5),
        "norm": round(norm, 3),
        "lr": rate(config, step - 1),
        "tokens": step * tokens,
        "tokens_per_second": round((step - first) * tokens / spent),
        "seconds": round(spent, 1),
    }


def _claim(config: ReasoningConfig, out: Path) -> None:
    """Raises ValueError where another configuration trains in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    copied = out / CONFIG
    if copied.exists() and json.loads(copied.read_text()) != config.to_dict():
        raise ValueError(f"{out} holds a run of another configuration; name another folder")
    copied.write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def _keep(masters: Any, optimizer: torch.optim.Optimizer, out: Path, step: int) -> None:
    before = checkpoint.newest(out)
    folder = out / checkpoint.CHECKPOINTS / f"checkpoint-{step}"
    with checkpoint.told(folder):
        checkpoint.save(masters, optimizer, folder)
        (folder / checkpoint.STATE_FILE).write_text(json.dumps({"global_step": step}))
    if before is not None and before != folder:
        shutil.rmtree(before)


def _resume(masters: Any, optimizer: torch.optim.Optimizer, out: Path) -> int:
    """The step that the newest checkpoint was made after, its weights in place and the metrics cut there."""
    newest = checkpoint.newest(out)
    step = 0
    if newest is not None:
        checkpoint.load(masters, optimizer, newest)
        step = json.loads((newest / checkpoint.STATE_FILE).read_text())["global_step"]
    if (out / METRICS).exists():
        lines = [line for line in read_lines(out / METRICS) if line["step"] <= step]
        (out / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return step


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """config.json last, which says that the model is whole."""
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    partial = out / "partial"
    with checkpoint.told(out):
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        for file in sorted(partial.iterdir(), key=lambda f: f.name == "config.json"):
            file.replace(out / file.name)
        partial.rmdir()
