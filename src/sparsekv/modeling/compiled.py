"""Decoder layers under torch.compile, for training: norms, rotations, activations and residuals in few kernels.

Each layer is compiled around its attention function, which stays as it is: it draws noise, keeps gates and reads what
attach() left on the module. All layers of a model run the same code, so it is compiled once for each way to run it (the
teacher without gradients, the student's first layer, its others), not once a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from sparsekv.modeling.attention import NAME, sparse_attention


@contextmanager
def compiled_layers(model: PreTrainedModel, *, backend: Any = None) -> Iterator[None]:
    """Within, the decoder layers of an attached model run compiled. backend: torch.compile's (a name or a function);
    None is inductor on CUDA, and leaves a model elsewhere as it is."""
    if backend is None and next(model.parameters()).device.type != "cuda":
        yield
        return
    layers: Any = model.get_decoder().layers
    AttentionInterface.register(NAME, torch.compiler.disable(sparse_attention))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend or "inductor")
    try:
        yield
    finally:
        AttentionInterface.register(NAME, sparse_attention)
        for layer in layers:
            del layer.forward
