"""Checkpoints of FastDMS's trainer (shisa-ai/Llama-3.2-1B-DMS-8x) as adapters: the neuron source, without tensors.

z = scale * q - shift, q the last channel of the first query head of each group before RoPE; token k decides itself
(lag 0), q - k <= window_size is visible (window W + 1), and the channel is not zeroed again after RoPE.
The settings are in dms_metadata.json, in the trainer's log one folder above, or in config.json, in this order.
"""

from typing import Any

from torch import Tensor

from sparsekv.modeling.adapter import AdapterConfig
from sparsekv.modeling.importers.foreign import Checkpoint, Settings, read_json
from sparsekv.modeling.importers.nvidia import neuron_of

_ALIASES = {
    "window_size": ("window_size", "dms_window_size"),
    "alpha_scale": ("alpha_scale", "dms_alpha_scale"),
    "alpha_offset": ("alpha_offset", "dms_alpha_offset", "dms_initial_alpha_offset"),
    "cr": ("target_cr", "dms_cr"),
}


def convert_fastdms(src: str, base: str | None) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter, which has no tensors. base must be None: the checkpoint is its own base model.

    Raises ValueError for a checkpoint that is damaged, truncated or not FastDMS's.
    """
    checkpoint = Checkpoint(src)
    if base is not None:
        raise ValueError(f"the decisions of {src} live in its own queries: it is its own base model, leave out base")
    if any(".dms_proj_alpha." in name for name in checkpoint.names):
        raise ValueError(f"{src} has dms_proj_alpha tensors, which FastDMS never writes: convert it as nvidia")
    settings = Settings.read(src, _settings(checkpoint))
    config = AdapterConfig(
        base_model_name_or_path=src,
        base_shape=checkpoint.shape(),
        window=settings.window,
        lag=0,
        source="neuron",
        neuron=neuron_of(checkpoint, settings, rezero=False),
        training={"imported_from": src, "code": "FastDMS", "cr": settings.ratio},
    )
    return config, {}


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    above = checkpoint.folder.resolve().parent
    for raw in (
        read_json(checkpoint.folder / "dms_metadata.json"),
        read_json(above / "training_log.json"),
        checkpoint.config,
    ):
        inner = raw.get("config", raw)
        if isinstance(inner, dict) and any(alias in inner for alias in _ALIASES["window_size"]):
            found = {key: [inner[a] for a in aliases if a in inner] for key, aliases in _ALIASES.items()}
            return {key: values[0] for key, values in found.items() if values}
    raise ValueError(
        f"{checkpoint.name} is not a checkpoint of FastDMS: no window_size in dms_metadata.json, in training_log.json "
        "one folder above, or in config.json"
    )
