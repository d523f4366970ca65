"""Text that the model writes itself, where there is no data: what it will have to remember is what it writes.

Sampled from the plain model, from given prompts in turn or from random tokens; decided by the seed and how many texts
the device writes at once, and kept on disk by what is asked for.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sparsekv.assets.fetched import cache_folder, documents_once
from sparsekv.modeling.load import load_model
from sparsekv.ops.device import free_memory
from sparsekv.retrofit.data.config import Source

CPU_TEXTS, GPU_TEXTS = 32, 256
"""Texts that are written at once: at most so many on the CPU, and on a GPU, where they take at most a quarter of its
free memory, since a cache that grows is copied."""


def own_text(model: str, source: Source, *, seed: int) -> list[str]:
    """`source.documents` texts of up to `source.tokens` tokens. Raises ValueError as load_model does."""
    settings = asdict(source) | {"model": model, "seed": seed}
    del settings["weight"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return documents_once(cache_folder() / "own" / f"{digest}.json", lambda: _write(model, source, seed))


@torch.no_grad()
def _write(name: str, source: Source, seed: int) -> list[str]:
    loaded, tokenizer = load_model(name)
    model: Any = loaded
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    at_once = _texts_at_once(model, source.tokens)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        while len(texts) < source.documents:
            count = min(at_once, source.documents - len(texts))
            prompts = [
                source.prompts[(len(texts) + i) % len(source.prompts)] for i in range(count if source.prompts else 0)
            ]
            ids, mask = _starts(prompts, count, tokenizer, generator)
            settings = GenerationConfig(
                max_new_tokens=max(1, source.tokens - ids.shape[1]),
                do_sample=True,
                temperature=source.temperature,
                top_k=0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
            out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings)
            texts += tokenizer.batch_decode(out, skip_special_tokens=True)
    return texts


def _texts_at_once(model: Any, tokens: int) -> int:
    if model.device.type != "cuda":
        return CPU_TEXTS
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dense = 2 * config.num_hidden_layers * kv_heads * dim * model.dtype.itemsize * tokens  # bytes of one text's cache
    return max(1, min(GPU_TEXTS, free_memory(model.device) // (4 * dense)))


def _starts(prompts: list[str], count: int, tokenizer: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [count, longest], padded on the left."""
    if prompts:
        rows = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    else:
        known = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        drawn = torch.tensor(known)[torch.randint(len(known), (count, 1), generator=generator)]
        rows = list(drawn)
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return ids, mask
