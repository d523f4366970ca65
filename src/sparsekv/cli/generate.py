"""`sparsekv generate`: a prompt continued by the engine, as `sparsekv.LLM` does it; n samples share one prefill."""

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sparsekv.cli.models import open_model, setting_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekv.engine.kv import RequestKV
    from sparsekv.evals.methods.setting import Setting


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
    kv: "RequestKV"
    """Over all samples."""
    pages: int
    """At the end, those that samples share counted for each."""
    bytes: int
    """Of those pages, what policies remember of them included."""
    held: list[list[int]]
    """[layers][kv_heads]: slots in use at the end, summed over samples."""
    prompt_tokens: int
    tokens: int
    """Generated tokens, over all samples."""
    seconds: float
    """Of prefill and generation together."""


def command(
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    prompt: Annotated[str, Option(help="The text to continue, or with --chat the user's message.")],
    adapter: Annotated[str | None, Option(help="Trained eviction heads: a folder or a hub id.")] = None,
    policy: Annotated[str | None, Option(help="The method; see `sparsekv policies`. Default: dense, or dms.")] = None,
    cr: Annotated[
        float | None, Option(help="Compression ratio at --length tokens: of the adapter, or budget = --length / cr.")
    ] = None,
    length: Annotated[int | None, Option(help="Tokens that --cr is meant for; default: prompt + --max-tokens.")] = None,
    budget: Annotated[int | None, Option(help="Tokens that the policy may hold per head, or Quest read.")] = None,
    option: Annotated[list[str] | None, Option(help="Another of the policy's, such as sinks=8. Repeatable.")] = None,
    n: Annotated[int, Option("--n", "-n", help="Samples; they share the prompt's cache.")] = 1,
    max_tokens: Annotated[int, Option(help="Tokens to generate per sample, at most.")] = 128,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, Option(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[int, Option(help="Of the samples, and of a policy that draws.")] = 0,
    chat: Annotated[
        bool | None, Option("--chat/--raw", help="Use the chat template or the bare prompt; default: chat if any.")
    ] = None,
    kv_memory: Annotated[str | None, Option(help="Size of the KV pool, such as 512MiB.")] = None,
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, Option("--json", help="Print texts and statistics as JSON.")] = False,
) -> None:
    """Continue a prompt with a cache that forgets."""
    sampling = Sampling(n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    setting = setting_of(adapter=adapter, policy=policy, cr=cr, budget=budget, options=option, seed=seed)
    if length is not None and (cr is None or length < 1):
        raise ValueError(f"length is {length}; it is the number of tokens, 1 or more, that --cr is meant for")
    loaded, tokenizer = open_model(model, dtype=dtype)
    ids = prompt_ids(tokenizer, prompt, chat=chat)
    result = generate(loaded, tokenizer, ids, setting=setting, sampling=sampling, length=length, memory=kv_memory)
    if as_json:
        typer.echo(json.dumps(_record(model, result), ensure_ascii=False))
        return
    typer.echo("\n\n---\n\n".join(result.texts))
    typer.echo(_summary(result), err=True)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, *, chat: bool | None) -> list[int]:
    """The prompt's tokens, in the chat template if `chat` (None: if the tokenizer has one).

    Raises ValueError where a template is asked for and missing, or the prompt is empty.
    """
    if chat is None:
        chat = bool(tokenizer.chat_template)
    text = prompt
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("this model's tokenizer has no chat template; use --raw")
        turns = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    ids: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ValueError("the text is empty: it has no tokens")
    return ids


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ids: list[int],
    *,
    setting: "Setting",
    sampling: Sampling,
    length: int | None = None,
    memory: str | None = None,
) -> Generated:
    """Continue one prompt n times over one prefill. length: tokens that the setting's ratio is meant for; None = of the
    prompt and the longest continuation.

    Raises ValueError where the model cannot be governed so, or prompt and generation exceed its context or the pool.
    """
    import torch

    from sparsekv.engine import LLM, SamplingParams

    longest = len(ids) + sampling.max_tokens
    options = setting.arguments(tokens=longest if length is None else length)
    limit = model.config.get_text_config(decoder=True).max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and --max-tokens {sampling.max_tokens} would exceed the model's "
            f"context of {limit}; shorten the prompt or generate fewer tokens"
        )
    llm = LLM(model, tokenizer=tokenizer, kv_memory=memory, max_num_seqs=sampling.n, **options)
    params = SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    start = time.perf_counter()
    (output,) = llm.generate(ids, params, keep=True)
    seconds = time.perf_counter() - start
    states = [sample.session.state for sample in output.outputs if sample.session is not None]
    return Generated(
        texts=[sample.text for sample in output.outputs],
        kv=output.kv,
        pages=sum(state.pages for state in states),
        bytes=sum(state.bytes for state in states),
        held=torch.stack([state.lengths for state in states]).sum(0).tolist(),
        prompt_tokens=len(ids),
        tokens=sum(len(sample.token_ids) for sample in output.outputs),
        seconds=seconds,
    )


def _record(model: str, result: Generated) -> dict[str, Any]:
    kept = {"pages": result.pages, "bytes": result.bytes, "held": result.held}
    return {
        "model": model,
        "texts": result.texts,
        "kv": result.kv.to_dict() | kept,
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
        f"{human_bytes(result.bytes)}"
    )
