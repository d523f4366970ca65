"""The FastAPI application: routes, and what stands around them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel
from starlette.responses import FileResponse, JSONResponse, Response

from sparsekv import __version__
from sparsekv.modeling.attach import attachment_of
from sparsekv.server.openai import errors
from sparsekv.server.openai.chat import Chat
from sparsekv.server.openai.completions import Completion
from sparsekv.server.openai.errors import ApiError
from sparsekv.server.openai.prompts import Prompts, scored
from sparsekv.server.openai.replies import EventStream, JSONReply, Reply
from sparsekv.server.openai.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    DialRequest,
    TokenizeRequest,
)
from sparsekv.server.operate.dial import PAUSE
from sparsekv.server.operate.guard import Guard
from sparsekv.server.operate.logs import Logged
from sparsekv.server.operate.status import describe
from sparsekv.server.service import Service
from sparsekv.server.settings import ServerSettings


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every refusal and failure."""

    error: ErrorBody


PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 404, 408, 409, 413, 422, 429, 500, 503)
}


def make_app(service: Service) -> FastAPI:
    """The application over one service; it can be mounted, and run by any ASGI server."""
    settings = service.settings
    prompts = Prompts(service.llm, thinking_end=settings.thinking_end)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(_follow_pressure(service))
        yield
        following.cancel()
        prompts.close()

    app = FastAPI(title="sparsekv", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    _add_operations(app, service)
    _add_page(app, service)
    _add_models(app, service)
    _add_tokens(app, service, prompts)
    _add_answers(app, service, prompts)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Logged, service=service)
    return app


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=_REFUSALS)
    async def health() -> Response:
        """Liveness: 503 once the engine cannot run requests, and the server must be restarted."""
        return JSONResponse({"alive": service.alive}, status_code=200 if service.alive else 503)

    @app.get("/ready", responses=_REFUSALS)
    async def ready() -> Response:
        """Readiness: 503 while the server drains, too."""
        return JSONResponse({"ready": service.ready}, status_code=200 if service.ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: Literal["page.css", "page.js", "cache.js"]) -> Response:
        return FileResponse(PAGE / name, headers=_PAGE_HEADERS)

    @app.get("/status", responses=_REFUSALS)
    async def status() -> dict[str, Any]:
        """What the page shows beside a conversation."""
        return describe(service)

    @app.post("/dial", responses=_REFUSALS)
    async def dial(body: DialRequest) -> dict[str, Any]:
        """Turn the ratio of what comes, for every conversation."""
        if service.dial is None or service.dial.adaptive:
            raise ApiError(409, "this server's ratio cannot be turned by hand")
        await asyncio.to_thread(service.dial.turn, body.cr)
        return describe(service)


async def _follow_pressure(service: Service) -> None:
    while service.dial is not None and service.dial.adaptive and service.alive:
        await asyncio.to_thread(service.dial.follow_pressure)
        await asyncio.sleep(PAUSE)


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> dict[str, Any]:
        policy = attachment_of(service.llm.model).policy
        return {
            "id": service.settings.name,
            "object": "model",
            "created": service.started,
            "owned_by": "sparsekv",
            "max_model_len": service.llm.engine.max_model_len,
            "policy": policy.name,
        }

    @app.get("/v1/models", responses=_REFUSALS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}", responses=_REFUSALS)
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return card()


def _add_tokens(app: FastAPI, service: Service, prompts: Prompts) -> None:
    @app.post("/tokenize", responses=_REFUSALS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        _check_model(service, body.model)
        if body.messages is not None:
            ids = await prompts.chat(body.messages)
        else:
            ids = await prompts.encode(body.prompt or "", special=body.add_special_tokens)
        reply: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.llm.engine.max_model_len}
        if body.return_token_strs:
            reply["token_strs"] = await prompts.run(lambda: prompts.tokenizer.convert_ids_to_tokens(ids))
        return reply

    @app.post("/detokenize", responses=_REFUSALS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        _check_model(service, body.model)
        return {"prompt": await prompts.decode(body.tokens)}


def _add_answers(app: FastAPI, service: Service, prompts: Prompts) -> None:
    @app.post("/v1/chat/completions", responses=_REFUSALS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """A conversation's next turn."""
        _check_model(service, body.model)
        options: dict[str, Any] = {"tools": _tools(body), "template": body.chat_template_kwargs}
        ids = await prompts.chat(body.messages, **options)
        system = await prompts.system(body.messages, **options) if service.prefixes.usable else []
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = prompts.params(body, prompt=len(ids), limit=body.limit, logprobs=logprobs)
        return _reply(service, request, body, Chat(service, body, ids, params, system=system))

    @app.post("/v1/completions", responses=_REFUSALS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The continuation of texts."""
        _check_model(service, body.model)
        given = body.prompts()
        ids = [await prompts.encode(prompt) for prompt in given]
        params = [prompts.params(body, prompt=len(i), limit=body.max_tokens, logprobs=body.logprobs) for i in ids]
        texts: list[str] = []
        if body.echo:
            texts = [p if isinstance(p, str) else await prompts.decode(p) for p in given]
            if body.logprobs is not None:
                params = [scored(each, body.logprobs) for each in params]
        return _reply(service, request, body, Completion(service, body, ids, params, texts=texts))


def _reply(service: Service, request: Request, body: ChatRequest | CompletionRequest, work: Chat | Completion) -> Reply:
    deadline = min(body.deadline or service.settings.deadline, service.settings.deadline)
    note: Callable[..., None] = request.scope["note"]
    begun = time.monotonic()

    def ended(status: int) -> None:
        note(status=status, id=work.id, n=body.n, stream=body.stream, work_seconds=time.monotonic() - begun)
        note(**_told(work, service.settings))

    if body.stream:
        return EventStream(work.pieces(), deadline=deadline, ended=ended)
    return JSONReply(work.whole, deadline=deadline, ended=ended)


def _told(work: Chat | Completion, settings: ServerSettings) -> dict[str, Any]:
    """What the log says of a request: counts, and texts only where the operator wants them."""
    last = work.last if isinstance(work.last, dict) else {0: work.last}
    outputs = [output for output in last.values() if output is not None]
    samples = [sample for output in outputs for sample in output.outputs]
    told: dict[str, Any] = {
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "completion_tokens": sum(sample.span[1] - sample.span[0] for sample in samples),
        "finish_reasons": [sample.finish_reason for sample in samples],
    }
    if settings.log_prompts:
        ids = work.prompts if isinstance(work, Completion) else [work.ids]
        told["prompts"] = [work.service.llm.tokenizer.decode(each) for each in ids]
        told["texts"] = [sample.text for sample in samples]
    return told


def _tools(body: ChatRequest) -> Any:
    return None if body.tool_choice == "none" else body.tools


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.settings.name:
        message = f"there is no such model here; this server has {service.settings.name}"
        raise ApiError(404, message, param="model", code="model_not_found")
