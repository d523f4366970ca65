"""The arguments of vLLM that put the plugin to work: for `vllm.LLM` and for `vllm serve`."""

import json
import shlex
from pathlib import Path
from typing import Any

CONNECTOR = "SparseConnector"
"""The class in integrations.vllm.connector, as --kv-transfer-config names it."""
CHUNK = 2048
"""Tokens of a step. A prompt's chunk is bounded densely before it is measured: that much must be free."""
RECORDED = 1024
"""Tokens of the largest step that is a CUDA graph. Beyond, the device is busy for longer than the host launches."""


def engine_args(
    model: str,
    *,
    adapter: str | None = None,
    cr: float | None = None,
    tokens: int | None = None,
    policy: str = "dms",
    budget: int | None = None,
    sinks: int = 4,
    trusted_ratio: float = 1.0,
) -> dict[str, Any]:
    """Keywords for `vllm.LLM` or `vllm.EngineArgs`; vLLM's own may be added beside them.

    model: an embedded model's name, a folder, or a hub id. adapter with cr, and tokens, the length that cr is meant
    for, as in sparsekv.attach; or policy="streaming" with budget and sinks. trusted_ratio: above 1, let a context be
    that much longer than the pool holds densely; the engine stops where a sequence then proves less compressible.

    Raises ValueError for settings that do not fit each other or the model.
    """
    from transformers import AutoConfig

    from sparsekv.assets.embedded import resolve_model
    from sparsekv.integrations.vllm.settings import KEY, PAGE_SIZE, Settings, resolve

    if adapter is not None and Path(adapter).is_dir():
        adapter = str(Path(adapter).resolve())
    settings = Settings(
        adapter=adapter, cr=cr, tokens=tokens, policy=policy, budget=budget, sinks=sinks, trusted_ratio=trusted_ratio
    )
    folder = resolve_model(model)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no model {model}: {str(error).splitlines()[0]}") from None
    resolve(settings, config)
    return {
        "model": str(folder),
        "load_format": "sparsekv",
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": "sparsekv.integrations.vllm.connector",
            "kv_role": "kv_both",
        },
        "additional_config": {KEY: settings.to_dict()},
        "enable_prefix_caching": False,
        "block_size": PAGE_SIZE,
        "max_num_batched_tokens": CHUNK,
        "compilation_config": {"max_cudagraph_capture_size": RECORDED},
    }


def serve_arguments(arguments: dict[str, Any]) -> list[str]:
    """The same for `vllm serve`: the model, then options."""
    words = [str(arguments["model"])]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if name == "model":
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def command_line(words: list[str]) -> str:
    """As a shell reads it."""
    return shlex.join(words)
