"""Loading for commands: a model by name, folder or hub id, quietly; which method governs it."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekv.evals.methods.setting import Setting

ADAPTERS = "adapters"
"""The repository's folder of trained adapters."""


def quiet() -> None:
    """Keep Transformers' own notes and bars off the terminal; its errors still raise."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def open_model(
    name: str, *, dtype: str = "auto", only_safetensors: bool = False
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A causal language model in eval mode, on the GPU if there is one, and its tokenizer.

    dtype: a torch name such as "bfloat16"; "auto" is float32 on the CPU and the model's own type on a GPU.
    only_safetensors: refuse weights in a format that can run code.

    Raises ValueError where there is no such model.
    """
    quiet()
    import torch

    from sparsekv.modeling.load import load_model

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
    return load_model(name, dtype=None if dtype == "auto" else dtype, only_safetensors=only_safetensors)


def setting_of(
    *,
    adapter: str | None,
    policy: str | None,
    cr: float | None,
    budget: int | None,
    options: list[str] | None = None,
    seed: int | None = None,
) -> "Setting":
    """The setting that a command's options ask for: without any, dense. options: NAME=VALUE; seed: for a policy that
    draws.

    Raises ValueError for a choice that cannot be had.
    """
    from sparsekv.evals.methods.setting import Setting, policy_of
    from sparsekv.policies.registry import describe

    if adapter is None and policy is None and (cr is not None or budget is not None):
        given = "--cr" if cr is not None else "--budget"
        raise ValueError(f"{given} needs a method: pass --adapter, or --policy (see `sparsekv policies`)")
    policy = policy or policy_of(adapter)
    given_options = dict(_option(text) for text in options or [])
    if seed is not None and "seed" in describe(policy).options:
        given_options = {"seed": seed} | given_options
    return Setting(policy=policy, adapter=adapter, cr=cr, budget=budget, options=given_options)


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--option {text} has no '='; write --option NAME=VALUE, such as sinks=8")
    return name.strip().replace("-", "_"), yaml.safe_load(value)


def find_adapter(model_name: str) -> str:
    """The repository's adapter for an embedded model: `adapters/<name>` here or in the source checkout.

    Raises ValueError where there is none.
    """
    for root in (Path(), Path(__file__).parents[3]):
        folder = root / ADAPTERS / model_name
        if folder.is_dir():
            return str(folder)
    raise ValueError(
        f"there is no {ADAPTERS}/{model_name} here; run this in a clone of the sparsekv repository, "
        "or pass --adapter with a folder that `sparsekv retrofit` has written"
    )


def check_length(tokens: int, limit: int) -> None:
    """Raises ValueError where a text is longer than the model's context."""
    if tokens > limit:
        raise ValueError(f"the text has {tokens} tokens and the model's context is {limit}; shorten the text")
