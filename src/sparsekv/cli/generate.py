"""`sparsekv generate`: plain Transformers `generate` with a SparseCache; n samples fork one prefill."""

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sparsekv.cli.models import attach_from_options, open_model, tokens_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekv.cache.stats import KVStats


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt; the names are vLLM's."""

    n: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; it counts samples, so use at least 1")
        if self.max_tokens < 1:
            raise ValueError(f"max-tokens is {self.max_tokens}; use at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}; it is a share of probability, above 0 and up to 1")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"{self.n} greedy samples would all be the same; set --temperature above 0, or -n 1")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What one prompt gave."""

    texts: list[str]
    kv: "KVStats"
    prompt_tokens: int
    tokens: int
    """Generated tokens, over all samples."""
    seconds: float
    """Of prefill and generation together."""


def command(
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    prompt: Annotated[str, Option(help="The text to continue, or with --chat the user's message.")],
    adapter: Annotated[str | None, Option(help="Trained eviction heads: a folder or a hub id.")] = None,
    cr: Annotated[float | None, Option(help="Compression ratio of the adapter; 4 keeps a quarter.")] = None,
    policy: Annotated[str | None, Option(help="A policy without training, such as streaming; default: dense.")] = None,
    budget: Annotated[int | None, Option(help="Tokens that the policy may hold per head.")] = None,
    window: Annotated[int | None, Option(help="Recent tokens that the policy always keeps.")] = None,
    n: Annotated[int, Option("--n", "-n", help="Samples; they share the prompt's cache.")] = 1,
    max_tokens: Annotated[int, Option(help="Tokens to generate per sample, at most.")] = 128,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, Option(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[int, Option(help="Seed of the samples.")] = 0,
    chat: Annotated[
        bool | None, Option("--chat/--raw", help="Use the chat template or the bare prompt; default: chat if any.")
    ] = None,
    kv_memory: Annotated[str | None, Option(help="Size of the KV pool, such as 512MiB.")] = None,
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, Option("--json", help="Print texts and statistics as JSON.")] = False,
) -> None:
    """Continue a prompt with plain Transformers generation and a cache that forgets."""
    sampling = Sampling(n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    loaded, tokenizer = open_model(model, dtype=dtype)
    attach_from_options(loaded, adapter=adapter, cr=cr, policy=policy, budget=budget, window=window)
    result = generate(loaded, tokenizer, prompt_ids(tokenizer, prompt, chat=chat), sampling=sampling, memory=kv_memory)
    if as_json:
        typer.echo(json.dumps(_record(model, result), ensure_ascii=False))
        return
    typer.echo("\n\n---\n\n".join(result.texts))
    typer.echo(_summary(result), err=True)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, *, chat: bool | None) -> "Tensor":
    """int64 [1, tokens]: the prompt, in the chat template if `chat` (None: if the tokenizer has one).

    Raises ValueError where a template is asked for and missing, or the prompt is empty.
    """
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        return tokens_of(tokenizer, prompt)
    if not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template; use --raw")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokens_of(tokenizer, str(text), special=False)


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ids: "Tensor",
    *,
    sampling: Sampling,
    memory: str | None = None,
) -> Generated:
    """Continue one prompt, int64 [1, tokens], n times over one prefill of an attached model.

    Raises ValueError where prompt and generation exceed the model's context or the pool.
    """
    import torch
    from transformers import GenerationConfig

    from sparsekv.modeling.attach import attachment_of
    from sparsekv.modeling.cache import SparseCache

    prompt_tokens, limit = ids.shape[1], attachment_of(model).max_tokens
    if prompt_tokens + sampling.max_tokens > limit:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and --max-tokens {sampling.max_tokens} would exceed the model's "
            f"context of {limit}; shorten the prompt or generate fewer tokens"
        )
    ends = _ends(model, tokenizer)
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=bool(sampling.temperature),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **sampled,
    )
    torch.manual_seed(sampling.seed)
    ids = ids.to(model.device)
    cache = SparseCache(model, kv_memory=memory)
    start = time.perf_counter()
    with torch.inference_mode():
        if prompt_tokens > 1 and sampling.n > 1:  # generate() prefills the last token of the prompt, in every fork
            model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(sampling.n)
        batch = ids.expand(sampling.n, -1)
        write: Any = model.generate
        out = write(batch, attention_mask=torch.ones_like(batch), past_key_values=cache, generation_config=settings)
    new = [_until_end(row, ends) for row in out[:, prompt_tokens:].tolist()]
    return Generated(
        texts=tokenizer.batch_decode(new, skip_special_tokens=True),
        kv=cache.stats(),
        prompt_tokens=prompt_tokens,
        tokens=sum(len(row) for row in new),
        seconds=time.perf_counter() - start,
    )


def _ends(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end a text."""
    found: Any = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return [found] if isinstance(found, int) else list(found or [])


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Tokens up to and with the first end; what follows is padding."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _record(model: str, result: Generated) -> dict[str, object]:
    return {
        "model": model,
        "texts": result.texts,
        "kv": result.kv.to_dict(),
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
    }


def _summary(result: Generated) -> str:
    from sparsekv.cache.pages import human_bytes

    kv = result.kv
    return (
        f"{result.tokens} tokens in {result.seconds:.1f} s ({result.tokens / result.seconds:.1f}/s); the cache holds "
        f"{kv.tokens_held:.0f} of {kv.tokens_seen} tokens per head: ratio {kv.compression_ratio:.2f}, "
        f"{human_bytes(kv.bytes)}"
    )
