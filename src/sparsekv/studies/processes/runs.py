"""The runs: the same retrofit by one process and by several, and what tells how much of a difference is noise.

Every run makes the same steps of the same rows. `split` computes each step's rows in two parts, and `plain` without
torch.compile, which rounds to bfloat16 in other places: the same mathematics with sums in another order. What they
differ by is the noise that a comparison with several processes is measured against.

Two processes cannot share the three KV heads of the embedded model. Halves run on the same model with a fourth group of
heads whose output weights are zero, which computes the same logits.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekv.assets.embedded import resolve_model

HEADS, ALL = "configs/smollm2-135m.yaml", "configs/smollm2-135m-all.yaml"
FSDP = "configs/accelerate/fsdp2.yaml"
STEPS, SAVE_EVERY, KILL_AFTER = 50, 20, 25
"""A killed run ends soon after step KILL_AFTER, and goes on from the checkpoint before."""
SETTINGS = {"batch": 8, "evaluation": None, "calibration": {"targets": [1.25], "rows": 2, "length": 512, "lengths": []}}
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One retrofit."""

    way: str
    """Of bench.training.launch.WAYS."""
    like: str | None = None
    """The run whose losses it must have; None for those that others are compared with."""
    trainable: str = "heads"
    noise: bool = False
    """It differs from `like` in rounding alone, and its difference counts as noise."""
    widened: bool = False
    """On the model with a fourth group of heads."""
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    killed: bool = False


_SPLIT: dict[str, Any] = {"settings": {"accumulate": 2}, "noise": True}
_PLAIN: dict[str, Any] = {"environment": UNCOMPILED, "noise": True}
_HALVES: dict[str, Any] = {"way": "halves", "like": "four", "widened": True, "settings": {"tensor_parallel": 2}}

RUNS = {
    "one": Run(way="alone"),
    "one-split": Run(way="alone", like="one", **_SPLIT),
    "one-plain": Run(way="alone", like="one", **_PLAIN),
    "all": Run(way="alone", trainable="all"),
    "all-split": Run(way="alone", like="all", trainable="all", **_SPLIT),
    "all-plain": Run(way="alone", like="all", trainable="all", **_PLAIN),
    "four": Run(way="alone", widened=True),
    "four-split": Run(way="alone", like="four", widened=True, **_SPLIT),
    "four-plain": Run(way="alone", like="four", widened=True, **_PLAIN),
    "replicas": Run(way="replicas", like="one"),
    "shards": Run(way="shards", like="all", trainable="all"),
    "halves": Run(**_HALVES),
    "replicas-killed": Run(way="replicas", like="one", killed=True),
    "shards-killed": Run(way="shards", like="all", trainable="all", killed=True),
    "halves-killed": Run(**_HALVES, killed=True),
}
WAVES = [
    ["one", "all"],
    ["one-split", "all-split", "one-plain", "all-plain", "four", "four-split", "four-plain"],
    ["replicas"],
    ["shards"],
    ["halves"],
    ["replicas-killed", "shards-killed", "halves-killed"],
]
"""Those of a wave run side by side; one process of the first has a GPU to itself, so that its seconds count."""


@torch.no_grad()
def widen(name: str, folder: Path, *, processes: int = 2) -> str:
    """The folder of a Llama model with as many more groups of heads, copies of the first whose output weights are zero,
    as so many processes need to share its KV heads; the same logits. It is written where it is not there yet."""
    if (folder / "config.json").exists():
        return str(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype="auto")
    config = model.config
    kv, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    more, dim = -kv % processes, config.hidden_size // config.num_attention_heads
    dim = getattr(config, "head_dim", None) or dim

    def grown(rows: Tensor, heads: int) -> Tensor:
        return torch.cat([rows, rows[: heads * dim].repeat(more, 1)])

    state = model.state_dict()
    for key, weight in state.items():
        if key.endswith("q_proj.weight"):
            state[key] = grown(weight, group)
        elif key.endswith(("k_proj.weight", "v_proj.weight")):
            state[key] = grown(weight, 1)
        elif key.endswith("o_proj.weight"):
            state[key] = torch.cat([weight, weight.new_zeros(len(weight), more * group * dim)], dim=1)
    config.head_dim, config.num_key_value_heads = dim, kv + more
    config.num_attention_heads = group * (kv + more)
    made: Any = type(model)(config).to(model.dtype)
    made.load_state_dict(state)
    AutoTokenizer.from_pretrained(resolve_model(name)).save_pretrained(folder)
    made.generation_config = model.generation_config
    made.save_pretrained(folder)
    return str(folder)
