"""Checkpoints of a run: what is trained and its optimiser's state, by torch.distributed.checkpoint.

One process or many, sharded or not, write the same folder, and any number of them can go on from it. Frozen weights are
not in it.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

CHECKPOINTS, STATE_FILE, WEIGHTS = "checkpoints", "trainer_state.json", "trained"

_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
_WHOLE = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)


def save(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write what is trained. Every process calls it."""
    weights, states = get_state_dict(model, optimizer, options=_TRAINED)
    with _one_process():
        dcp_save({"model": weights, "optimizer": states}, checkpoint_id=folder / WEIGHTS)


def load(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Read what `save` wrote, in place. Every process calls it."""
    weights, states = get_state_dict(model, optimizer, options=_TRAINED)
    with _one_process():
        dcp_load({"model": weights, "optimizer": states}, checkpoint_id=folder / WEIGHTS)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=_TRAINED)


@contextmanager
def _one_process() -> Iterator[None]:
    """Without the library's remark that there are no others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Within, what the system says of a folder that cannot be written, such as a full disk, is one sentence."""
    try:
        yield
    except (OSError, CheckpointException, SafetensorError) as error:
        raise ValueError(
            f"cannot write {folder} ({reason(error)}); make room there and start again: what was saved before is "
            "whole, and the run goes on from it"
        ) from None


def reason(error: BaseException) -> str:
    """Why the system refused, without the tracebacks that a checkpoint's error carries of each process."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name, whole and on the CPU. Every process calls it; only the first gets the tensors."""
    found: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    # torch 2.11 leaves out a frozen parameter by one of its names only, and tied ones have two.
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in found.items() if name not in frozen}


def newest(output: Path) -> Path | None:
    """The last checkpoint of a run that was written to its end: Trainer writes the state file last."""
    whole = []
    for folder in (output / CHECKPOINTS).glob("checkpoint-*"):
        try:
            whole.append((json.loads((folder / STATE_FILE).read_text())["global_step"], folder))
        except (OSError, ValueError, KeyError):
            continue  # killed while it was being written
    return max(whole)[1] if whole else None
