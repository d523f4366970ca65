"""Low-rank weights beside the heads, by PEFT, trained in float32 (arXiv 2106.09685)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.lora import Lora
from sparsekv.retrofit.config import LoraConfig


class TrainedLora(Lora):
    """PEFT's layers in a model, put there in place. Raises ValueError without PEFT or for targets that are not there.

    seed: of the random half of the weights; the other half is zero, so that the student begins as its teacher.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig, *, seed: int) -> None:
        try:
            import peft
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError:
            raise ValueError("trainable: lora needs PEFT; run pip install 'sparsekv[train]'") from None
        settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                peft.inject_adapter_in_model(settings, model)
            except ValueError as error:
                raise ValueError(f"lora.targets do not fit this model: {str(error).splitlines()[0]}") from None
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._model = model
        for layer in self._layers:
            layer.lora_A.float()
            layer.lora_B.float()

    def state(self) -> dict[str, Tensor]:
        return {peft_name(name): p for name, p in self._model.named_parameters() if ".lora_" in name}

    @contextmanager
    def out(self) -> Iterator[None]:
        self._disable(True)
        try:
            yield
        finally:
            self._disable(False)

    def _disable(self, disabled: bool) -> None:
        for layer in self._layers:
            layer._disable_adapters = disabled  # enable_adapters() would also freeze the weights, under FSDP for good


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> None:
    """Give an attached model low-rank weights to train."""
    attachment_of(model).lora = TrainedLora(model, config, seed=seed)


def peft_name(name: str) -> str:
    """A parameter's name without PEFT's name of the one adapter."""
    return name.replace(".default.", ".")
