"""A causal language model and its tokenizer, by embedded name, folder or hub id: the one place that loads them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed.configuration_utils import DistributedConfig

from sparsekv.assets.embedded import resolve_model
from sparsekv.assets.fetched import cache_folder


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    tensor_parallel: int = 1,
    only_safetensors: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """In evaluation mode. device: None = the GPU if there is one. dtype: None = float32 on the CPU, elsewhere the
    model's own. tensor_parallel: so many processes, all there are, call this together and share the model.
    only_safetensors: refuse weights in a format that can run code (pickles).

    Raises ValueError where there is no such model, or no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda and this machine shows none; use device=cpu or leave it out")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else "auto"
    shared = {} if tensor_parallel == 1 else {"distributed_config": DistributedConfig(tp_size=tensor_parallel)}
    folder = _resolved(name)
    with _named(name, folder):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=only_safetensors or None, **shared
        )
    return (model if shared else model.to(device)).eval(), load_tokenizer(name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone. Raises ValueError where there is no such model."""
    folder = _resolved(name)
    with _named(name, folder):
        return AutoTokenizer.from_pretrained(folder)


def _resolved(name: str) -> str:
    try:
        return resolve_model(name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot keep {name} in {cache_folder()} ({reason}): make room there and try again") from None


@contextmanager
def _named(name: str, folder: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        mend = f"delete the folder {folder}, and it is fetched again" if folder != name else "copy or fetch it again"
        raise ValueError(f"cannot load {name}: its weights are damaged ({error}); {mend}") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(" .:")
        raise ValueError(
            f"cannot load {name}: it is neither smollm2-135m, nor a folder with a model, nor one that the hub gives "
            f"({reason})"
        ) from None
