"""`sparsekv serve`: an OpenAI-compatible server on our engine, for any method; or vLLM's, with our plugin."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sparsekv.cli import serve_vllm
from sparsekv.cli.models import open_model, setting_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsekv.evals.methods.setting import Setting
    from sparsekv.server.settings import ServerSettings


class Engine(Enum):
    """Whose."""

    sparsekv = "sparsekv"
    vllm = "vllm"


def command(
    ctx: typer.Context,
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    behind: Annotated[list[str] | None, Argument(help="With --engine vllm: vLLM's own options, behind --.")] = None,
    engine: Annotated[Engine, Option(help="Ours, or vLLM with the plugin.")] = Engine.sparsekv,
    adapter: Annotated[str | None, Option(help="Trained eviction heads: a folder or a hub id.")] = None,
    policy: Annotated[str | None, Option(help="The method; see `sparsekv policies`. Default: dense, or dms.")] = None,
    cr: Annotated[float | None, Option(help="Compression ratio: of the adapter, or budget = --length / cr.")] = None,
    length: Annotated[int | None, Option(help="Tokens that --cr is meant for.")] = None,
    budget: Annotated[int | None, Option(help="Tokens that the policy may hold per head, or Quest read.")] = None,
    option: Annotated[list[str] | None, Option(help="Another of the policy's, such as sinks=8. Repeatable.")] = None,
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen at.")] = 8000,
    name: Annotated[str | None, Option(help="What clients call the model; default: as given here.")] = None,
    api_keys: Annotated[Path | None, Option(help="File of API keys, one a line.")] = None,
    kv_memory: Annotated[str | None, Option(help="Size of the KV pool, such as 512MiB.")] = None,
    max_num_seqs: Annotated[int, Option(help="Samples that run at once.")] = 64,
    max_num_batched_tokens: Annotated[int, Option(help="Tokens of a step.")] = 8192,
    max_model_len: Annotated[int | None, Option(help="Tokens of a sequence; default: the model's context.")] = None,
    max_waiting: Annotated[int, Option(help="Samples that may wait; more are refused with 429.")] = 256,
    max_samples: Annotated[int, Option(help="Samples of one request: prompts times n.")] = 128,
    max_body: Annotated[str, Option(help="Size of a request.")] = "4MiB",
    prefix_cache: Annotated[str, Option(help="Host memory for chats that may go on; 0 keeps none.")] = "512MiB",
    deadline: Annotated[float, Option(help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[float, Option(help="Seconds for running requests after SIGTERM.")] = 60.0,
    thinking_end: Annotated[
        str | None, Option(help="What the model writes after a thought; default: its tokenizer's.")
    ] = None,
    scorer: Annotated[str | None, Option(help="URL of a process reward model, such as vLLM's /pooling.")] = None,
    scorer_model: Annotated[str | None, Option(help="What the scorer calls its model.")] = None,
    cors_origin: Annotated[list[str] | None, Option(help="Origin of a page that may call. Repeatable.")] = None,
    adaptive_cr: Annotated[
        str | None, Option(help="Bounds such as 4:8 between which the ratio follows the pool's pressure.")
    ] = None,
    fixed_cr: Annotated[bool, Option("--fixed-cr", help="Nobody turns the ratio from the page.")] = False,
    log_prompts: Annotated[bool, Option("--log-prompts", help="Write prompts and answers into the log.")] = False,
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    enforce_eager: Annotated[bool, Option("--enforce-eager", help="No torch.compile and no CUDA graphs.")] = False,
) -> None:
    """Serve a model with a cache that forgets."""
    setting = setting_of(adapter=adapter, policy=policy, cr=cr, budget=budget, options=option)
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; use a number from 1 to 65535, or 0 for any that is free")
    if engine is Engine.vllm:
        serve_vllm.check_given(ctx)
        words = {"length": length, "host": host, "port": port, "name": name or model, "behind": behind or []}
        serve_vllm.run(serve_vllm.server_command(model, setting, **words))
    if behind:
        raise ValueError(f"what to do with {' '.join(behind)}? Options of vLLM go with --engine vllm")
    settings = _settings(
        name=name or model,
        api_keys=api_keys,
        scorer=scorer,
        scorer_model=scorer_model,
        max_body=max_body,
        prefix_cache=prefix_cache,
        max_waiting=max_waiting,
        max_samples=max_samples,
        deadline=deadline,
        drain=drain,
        thinking_end=thinking_end,
        cors=tuple(cors_origin or ()),
        log_prompts=log_prompts,
    )
    from sparsekv.server.operate.dial import bounds

    between = None if adaptive_cr is None else bounds(adaptive_cr)
    if between is not None and (adapter is None or cr is not None or fixed_cr):
        raise ValueError("--adaptive-cr turns an adapter by itself; give --adapter, without --cr and --fixed-cr")
    if between is not None:
        setting = setting_of(adapter=adapter, policy=policy, cr=between[0], budget=budget, options=option)
    from sparsekv.engine import LLM
    from sparsekv.server.operate.dial import Dial
    from sparsekv.server.operate.logs import configure
    from sparsekv.server.run import DrainingServer
    from sparsekv.server.service import Service

    loaded, tokenizer = open_model(model, dtype=dtype, only_safetensors=True)
    llm = LLM(
        loaded,
        tokenizer=tokenizer,
        kv_memory=kv_memory,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
        max_model_len=max_model_len,
        enforce_eager=enforce_eager,
        **_governed(setting, loaded, length=length or max_model_len),
    )
    configure()
    with llm:
        dial = None
        if setting.adapter is not None and setting.cr is not None and not fixed_cr:
            low, high = between or (1.0, max(llm.max_cr, setting.cr))
            tokens = length or max_model_len
            dial = Dial(llm=llm, cr=setting.cr, low=low, high=high, tokens=tokens, adaptive=between is not None)
        server = DrainingServer(Service(llm, settings, dial=dial), host=host, port=port)
        shown = "localhost" if host in ("127.0.0.1", "0.0.0.0") else host
        typer.echo(f"{settings.name} at http://{shown}:{port}/v1 (OpenAI's API); end with Ctrl-C", err=True)
        server.run()


def _settings(
    *,
    api_keys: Path | None,
    scorer: str | None,
    scorer_model: str | None,
    max_body: str,
    prefix_cache: str,
    **others: Any,
) -> "ServerSettings":
    """Raises ValueError for settings that cannot be had, and where the extra `server` is not installed."""
    from sparsekv.cache.pages import parse_bytes
    from sparsekv.scaling.scorer import Scorer
    from sparsekv.server.settings import ServerSettings, read_keys

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}; run pip install 'sparsekv[server]'") from None
    if (scorer is None) != (scorer_model is None):
        raise ValueError("a scorer has a URL and a model; give both --scorer and --scorer-model")
    return ServerSettings(
        api_keys=() if api_keys is None else read_keys(api_keys),
        scorer=None if scorer is None or scorer_model is None else Scorer(url=scorer, model=scorer_model),
        max_body=parse_bytes(max_body),
        prefix_cache=0 if prefix_cache == "0" else parse_bytes(prefix_cache),
        **others,
    )


def _governed(setting: "Setting", model: "PreTrainedModel", *, length: int | None) -> dict[str, Any]:
    """LLM's arguments. An adapter is dialled at `length` where it is given, else where its table was measured."""
    context = model.config.get_text_config(decoder=True).max_position_embeddings
    arguments = setting.arguments(tokens=length or context)
    if setting.adapter is not None and length is None:
        arguments.pop("tokens", None)
    return arguments
