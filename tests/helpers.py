"""What many tests share: tiny random models, random heads, the oracle of the hard rule, a policy on a bare cache."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import sparsekv
from sparsekv.attend import Executor, Part, allocate
from sparsekv.cache.ragged import RaggedCache
from sparsekv.cache.state import HeadShape
from sparsekv.ops.decode.reference import gather_slots
from sparsekv.ops.layout import batch_of
from sparsekv.policies import Policy

VOCABULARY = 61
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None, "head_dim": 8},
    "Gemma3": {
        "head_dim": 8,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "Phi3": {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    "Olmo2": {},
}


def tiny_model(family: str = "Llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random decoder of two layers, four query and two KV heads of size 8, with attention far from uniform."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        **FAMILIES.get(family, {}),
        **config,
    }
    built = getattr(hf, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(**settings)
    torch.manual_seed(seed)
    model = getattr(hf, f"{family}ForCausalLM")(built).to(dtype).eval()
    # Ends a text only where a test asks for it, and never warns about padding.
    model.generation_config = hf.GenerationConfig(pad_token_id=0, eos_token_id=None)
    return model


def tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """int64 [rows, length], never 0 (the padding)."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_heads(model: PreTrainedModel, *, seed: int = 0, bias: float = 0.0) -> PreTrainedModel:
    """Give an attached model eviction heads that mark about half of all tokens (more with a positive bias)."""
    generator = torch.Generator().manual_seed(seed)
    for head in sparsekv.heads(model):
        head.weight.data = torch.randn(head.weight.shape, generator=generator) / head.weight.shape[1] ** 0.5
        head.bias.data.fill_(bias)
    return model


def dms_model(family: str = "Llama", *, window: int = 4, lag: int = 0, bias: float = 0.0, **config: Any) -> Any:
    """A tiny float64 model attached with random eviction heads."""
    model = tiny_model(family, dtype=torch.float64, **config)
    sparsekv.attach(model, policy="dms", window=window, lag=lag)
    return random_heads(model, bias=bias)


# The oracle: a plain model, a naive attention with the full square, and its own copy of the rule


@torch.no_grad()
def oracle_logits(attached: Any, ids: Tensor, *, window: int, lag: int = 0) -> Tensor:
    """[1, S, vocab]: one unpadded text through an unattached twin whose attention applies the hard mask densely."""
    twin = type(attached)(deepcopy(attached.config)).to(attached.dtype).eval()
    twin.load_state_dict(attached.state_dict(), strict=False)
    heads = iter(sparsekv.heads(attached))
    for layer in twin.model.layers:
        sliding = getattr(layer.self_attn, "is_sliding", False) and twin.config.sliding_window
        layer.self_attn.oracle = _Rule(window=window, lag=lag, head=None if sliding else next(heads), sliding=sliding)
        layer.self_attn.register_forward_pre_hook(_remember_hidden, with_kwargs=True)
    AttentionInterface.register("oracle", _naive_attention)
    AttentionMaskInterface.register("oracle", lambda *args, **kwargs: None)
    twin.set_attn_implementation("oracle")
    return twin(ids, use_cache=False).logits


@dataclass
class _Rule:
    window: int
    lag: int
    head: Any
    sliding: Any
    hidden: Any = None

    def visible(self, length: int) -> Tensor:
        """bool [kv_heads or 1, S, S]"""
        q, k = torch.arange(length)[:, None], torch.arange(length)
        if self.head is None:
            return ((k <= q) & (q - k < self.sliding))[None]
        z = self.hidden[0].float() @ self.head.weight.T + self.head.bias
        evicted = torch.zeros(z.shape[1], length, dtype=torch.bool)
        evicted[:, : length - self.lag] = z[self.lag :].T > 0
        return (k <= q) & (~evicted[:, None] | (q - k < self.window))


def _remember_hidden(module: Any, args: Any, kwargs: Any) -> None:
    module.oracle.hidden = kwargs["hidden_states"]


def _naive_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    group = query.shape[1] // key.shape[1]
    visible = module.oracle.visible(query.shape[2]).expand(key.shape[1], -1, -1).repeat_interleave(group, 0)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2) * module.scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


# A policy on a bare cache of one layer, in which every key and value names its token


@dataclass(kw_only=True)
class Run:
    """Drives one layer. Token t of a row has key and value [t, t * t]; queries are what the test passes."""

    policy: Policy
    rows: int = 1
    heads: int = 2
    group: int = 1
    page_size: int = 2
    pages: int = 400
    max_tokens: int = 100
    executor: Executor = field(init=False)

    def __post_init__(self) -> None:
        shape = HeadShape(kv_heads=self.heads, group=self.group, dim=2, dtype=torch.float64)
        options = {"rows": self.rows, "max_tokens": self.max_tokens, "device": "cpu"}
        cache = allocate([self.policy], shape, pages=self.pages, page_size=self.page_size, **options)
        self.executor = Executor(cache, [self.policy], count_reads=True)

    @property
    def cache(self) -> RaggedCache:
        return self.executor.ragged

    def step(self, counts: list[int], *, hidden: Tensor, query: Tensor) -> Tensor:
        """counts: new tokens of each row; hidden: [T, any]; query: [T, H * G, 2]. Returns [T, H * G, 2]."""
        seen = self.cache.layer(0).seen
        first = seen.tolist()
        names = torch.tensor([float(first[row] + i) for row, n in enumerate(counts) for i in range(n)]).double()
        key = torch.stack([names, names**2], -1)[:, None].expand(-1, self.heads, -1)
        batch = batch_of(torch.arange(len(counts)), counts)
        part = Part(
            batch=batch, seen=seen[batch.rows], tokens=sum(counts), most=max(map(sum, zip(first, counts, strict=False)))
        )
        return self.executor.run(0, part, [hidden, query, key, key], 0.1)

    def held(self, row: int = 0, head: int = 0) -> list[float]:
        """The tokens that a head holds, ascending, read off its pages."""
        layer = self.cache.layer(0)
        keys, _ = gather_slots(layer, row, layer.lengths[row].tolist())[head]
        return sorted(keys[:, 0].tolist())


def attend(query: Tensor, held: list[float], *, scale: float = 0.1) -> Tensor:
    """Naive attention of query [2] over named tokens: [2]."""
    kv = torch.tensor([[t, t * t] for t in held], dtype=torch.float64)
    return (kv @ query * scale).softmax(0) @ kv


def check_pages(cache: RaggedCache) -> None:
    """Free pages and owned pages are all pages, each once; owners are counted right."""
    pool = cache.pool
    free = pool.free[: pool.pages_free].tolist()
    owned = cache.pages[cache.owned(torch.arange(cache.rows))].tolist()
    assert len(set(free)) == len(free)
    assert sorted(free + sorted(set(owned))) == list(range(pool.pages))
    owners = torch.bincount(torch.tensor(owned, dtype=torch.int64), minlength=pool.pages)
    assert torch.equal(pool.extra_owners.long(), (owners - 1).clamp(min=0))
