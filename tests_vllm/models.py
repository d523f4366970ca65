"""A tiny random model of a family with random eviction heads that hold about a third, and what sparsekv.LLM answers."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparsekv
import tiny
from helpers import tiny_model
from sparsekv.dms import NeuronSource
from sparsekv.modeling.adapter import PREFIX, AdapterConfig, base_shape, write_adapter

VOCABULARY, LAYERS, HEADS, HIDDEN = 400, 3, 2, 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
}
NEURON_OFFSET = 80.0
LENGTHS = (5, 12, 33, 47, 64, 90, 120, 150)


@dataclass(frozen=True, kw_only=True)
class Made:
    """Folders, and the loaded model that answers as it should be."""

    model: str
    adapter: str
    reference: Any
    prompts: list[list[int]]

    def answers(self, prompts: list[list[int]] | None = None, **params: Any) -> list[Any]:
        """What sparsekv.LLM says, each prompt in the same batch: RequestOutputs."""
        options = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True} | params
        return self.reference.generate(self.prompts if prompts is None else prompts, sparsekv.SamplingParams(**options))


def make(folder: Path, family: str, *, lag: int = 0, kv_heads: int = HEADS, neuron: bool = False) -> Made:
    """The heads' weights are wide, so that marks differ between tokens; their biases lean to forgetting. neuron: no
    heads, the queries carry the logits."""
    shape = SHAPE | FAMILIES.get(family, {}) | {"num_key_value_heads": kv_heads}
    model = tiny_model(family, **shape)
    model.save_pretrained(folder / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer in range(LAYERS):
        name = f"{PREFIX}model.layers.{layer}.self_attn.eviction_head"
        state[f"{name}.weight"] = torch.randn(kv_heads, HIDDEN, generator=generator) * 0.3
        state[f"{name}.bias"] = torch.full((kv_heads,), 2.0 + layer / 2)
    options = {"window": 16, "lag": lag}
    if neuron:
        state = {}
        options |= {"source": "neuron", "neuron": NeuronSource(offset=NEURON_OFFSET)}
    config = AdapterConfig(base_model_name_or_path=family, base_shape=base_shape(model), **options)
    write_adapter(folder / "adapter", config, state)
    rng = random.Random(0)
    return Made(
        model=str(folder / "model"),
        adapter=str(folder / "adapter"),
        reference=sparsekv.LLM(model, adapter=str(folder / "adapter"), tokenizer=tokenizer, kv_memory="64MiB"),
        prompts=[[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS],
    )
