"""Making the runs: wave after wave, each by the command that docs/retrofit.md gives, one JSON line each as it is made.

A run that fails, or takes too long, is a line that says so, and the next one goes on; it is tried again when the study
is. Runs that the results hold whole are not made again.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsekv.bench.timing import median
from sparsekv.bench.training.launch import command_of, last_words, start
from sparsekv.json_lines import append, parsed, read_lines, whole
from sparsekv.modeling.adapter import read_adapter
from sparsekv.retrofit.config import load_config, parse_config, save_config
from sparsekv.retrofit.training.checkpoint import newest
from sparsekv.retrofit.training.metrics import METRICS_FILE
from sparsekv.studies.processes import runs as table
from sparsekv.studies.processes.compare import Line, compared
from sparsekv.studies.processes.runs import RUNS, WAVES, Run, widen
from sparsekv.studies.runner import Say, to_stderr

RESULTS, MODULE = "processes.jsonl", "sparsekv.retrofit"
WARM_UP = 5
"""Steps whose seconds do not count: kernels are compiled in them, also after a resume."""


def perform(
    folder: Path,
    *,
    settings: dict[str, Any] | None = None,
    only: Sequence[str] | None = None,
    seconds: float = float("inf"),
    run_seconds: float = 240,
    shared: bool = False,
    say: Say = to_stderr,
) -> list[Line]:
    """Make the runs that folder/processes.jsonl lacks and return all its lines. settings: over every run's (`model`,
    `max_steps`, ...). only: names. seconds: what runs then is ended, and nothing is begun after. shared: other work has
    the GPUs too, so that no run's seconds count. Raises ValueError for an unknown name or settings that no retrofit
    has."""
    unknown = sorted(set(only or ()) - set(RUNS))
    if unknown:
        raise ValueError(f"unknown runs {', '.join(unknown)}; there are {', '.join(RUNS)}")
    folder.mkdir(parents=True, exist_ok=True)
    results, deadline = folder / RESULTS, time.monotonic() + seconds
    gpus = torch.cuda.device_count()
    write = threading.Lock()
    names = RUNS if only is None else only
    for name in names:
        _configure(name, folder, settings or {})

    def make(name: str, place: int, *, beside: int) -> None:
        left = min(run_seconds, deadline - time.monotonic())
        line = _made(name, folder, gpu=place % gpus if gpus else None, seconds=left)
        line["own_gpus"] = not shared and (beside == 1 or RUNS[name].way == "alone" and beside <= gpus)
        with write:
            if "error" not in line:
                line |= compared(name, line["losses"], _lines(results))
            append(results, [line])
            print(json.dumps(line), flush=True)

    for wave in WAVES:
        whole = {line["run"] for line in _lines(results) if "error" not in line}
        todo = [name for name in wave if name in names and name not in whole]
        if todo and time.monotonic() > deadline:
            say(f"The {seconds:g} seconds are over: {', '.join(todo)} and what follows are left out")
            break
        with ThreadPoolExecutor(max(len(todo), 1)) as pool:
            list(pool.map(partial(make, beside=len(todo)), todo, range(len(todo))))
    return _lines(results)


def _lines(results: Path) -> list[Line]:
    return read_lines(results) if results.exists() else []


def _configure(name: str, folder: Path, settings: dict[str, Any]) -> None:
    """Write folder/NAME.yaml."""
    run = RUNS[name]
    base = yaml.safe_load(Path(table.HEADS if run.trainable == "heads" else table.ALL).read_text(encoding="utf-8"))
    base |= table.SETTINGS | {"max_steps": table.STEPS, "save_every": table.SAVE_EVERY} | settings | run.settings
    if run.widened:
        base["model"] = widen(base["model"], folder / "widened")
    save_config(parse_config(base | {"output": str(folder / name)}), folder / f"{name}.yaml")


def _made(name: str, folder: Path, *, gpu: int | None, seconds: float) -> Line:
    run, begun = RUNS[name], time.monotonic()
    about: Line = {"study": "processes", "run": name, "way": run.way, "trainable": run.trainable}
    about |= {"processes": 1 if run.way == "alone" else 2, "like": run.like, "noise": run.noise}
    try:
        found = _launch(name, folder, gpu=gpu, deadline=begun + seconds)
    except (TimeoutError, RuntimeError, ValueError, OSError) as error:
        return about | {"error": str(error), "wall_s": round(time.monotonic() - begun, 1)}
    return about | found | {"wall_s": round(time.monotonic() - begun, 1)}


def _launch(name: str, folder: Path, *, gpu: int | None, deadline: float) -> Line:
    """Raises RuntimeError with the log's last words where the command fails, TimeoutError where it does not end."""
    run, output, log = RUNS[name], folder / name, folder / f"{name}.log"
    shutil.rmtree(output, ignore_errors=True)
    log.unlink(missing_ok=True)
    command = command_of(
        run.way,
        MODULE,
        [str(folder / f"{name}.yaml")],
        processes=2,
        gpus=gpu is not None,
        shards=["--config_file", table.FSDP],
    )
    environment = dict(run.environment)
    if run.way == "alone" and gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)

    def go(until: Callable[[], bool] = lambda: False) -> int | None:
        return start(command, log, seconds=deadline - time.monotonic(), environment=environment, until=until)

    found: Line = {}
    if run.killed:
        config = load_config(folder / f"{name}.yaml")
        at = min(table.KILL_AFTER, config.steps // 2 + 1)
        code = go(lambda: len(_metrics(output)) >= at and newest(output) is not None)
        if code is not None:
            raise RuntimeError(f"it ended, with exit code {code}, before it was killed: {last_words(log)}")
        kept = newest(output)
        assert kept is not None
        found = {"killed_after": len(_metrics(output)), "resumed_from": int(kept.name.rpartition("-")[2])}
    if (code := go()) != 0:
        raise RuntimeError(f"exit code {code}: {last_words(log)}")
    return found | _measured(run, output)


def _measured(run: Run, output: Path) -> Line:
    steps, made = _metrics(output), read_adapter(output)[0].training
    timed = [step["seconds"] for step in steps[WARM_UP:]] or [step["seconds"] for step in steps]
    memory = [step["memory_gib"] for step in steps if step["memory_gib"] is not None]
    return {
        "model": made["model"],
        "seed": made["seed"],
        "batch": made["batch"],
        "length": made["length"],
        "losses": [step["loss"] for step in steps],
        "divergences": [step["divergence"] for step in steps],
        "seconds_per_step": median(timed),
        "memory_gib": max(memory) if memory else None,
        **{key: made[key] for key in ("hardware", "torch", "commit")},
    }


def _metrics(output: Path) -> list[Line]:
    """Whole lines; a killed process may have left half a one."""
    path = output / METRICS_FILE
    return parsed(whole(path.read_text(encoding="utf-8")), name=path) if path.exists() else []
