"""/v1/chat/completions: one conversation, n answers, whole or as they grow."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from typing import Any

from sparsekv.engine.outputs import CompletionOutput, RequestOutput, Session
from sparsekv.engine.params import SamplingParams
from sparsekv.server.openai import tools
from sparsekv.server.openai.errors import ApiError
from sparsekv.server.openai.requests import ChatRequest
from sparsekv.server.openai.shapes import chat_logprobs, sample_ids, usage
from sparsekv.server.openai.votes import Ballot, outcome
from sparsekv.server.operate.watch import pieces
from sparsekv.server.service import Service

LOOK = 0.25
"""Seconds between two looks at a cache."""


class Chat:
    """One request under way. system: the tokens of its system message, empty without one."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        ids: list[int],
        params: SamplingParams,
        *,
        system: list[int],
    ) -> None:
        self.service, self.request = service, request
        self.ids, self.params, self.system = ids, params, system
        self.cached = 0
        """Tokens of the prompt that were stored."""
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.ballot = None
        if request.vote is not None:
            self.ballot = Ballot(options=request.vote, samples=params.n, scorer=service.settings.scorer)
        self.calls = bool(request.tools) and request.tool_choice != "none"
        if request.watch and service.watch is None:
            raise ApiError(400, "the cache cannot be watched inside CUDA graphs; serve with --enforce-eager")
        self.last: RequestOutput | None = None
        self._shown = 0
        """Tokens whose text a watcher has."""

    async def whole(self) -> dict[str, Any]:
        """chat.completion."""
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                self.last = output
        assert self.last is not None
        choices = [self._choice(sample) for sample in self.last.outputs]
        reply = self._head("chat.completion") | {"choices": choices, "usage": usage([self.last], cached=self.cached)}
        return reply | await self._vote()

    async def pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        """chat.completion.chunk after chunk."""
        told = [_Told() for _ in range(self.params.n)]
        with_usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        head = self._head("chat.completion.chunk") | ({"usage": None} if with_usage else {})
        looked = 0.0
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                self.last = output
                for sample, before in zip(output.outputs, told, strict=True):
                    for choice in self._deltas(sample, before):
                        yield head | {"choices": [choice]}
                if self.request.watch and (output.finished or time.monotonic() - looked > LOOK):
                    cache = await self._look(output)
                    if cache is not None:
                        yield head | {"choices": [], "cache": cache}
                    looked = time.monotonic()
        assert self.last is not None
        counted = await self._vote()
        if counted:
            yield head | {"choices": []} | counted
        if with_usage:
            yield head | {"choices": [], "usage": usage([self.last], cached=self.cached)}

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        stop_when = None if self.ballot is None else self.ballot.stop_when
        watch = self.service.watch if self.request.watch else None
        watching = nullcontext() if watch is None else watch.watching(self.id)
        service, epoch = self.service, self.service.epoch
        with service.admitted(self.params.n), watching:
            session = await self._stored(epoch) if watch is None else None  # a watcher wants to see each key stored
            keep = watch is not None or (service.prefixes.usable and self.params.n == 1)
            options: dict[str, Any] = {"stop_when": stop_when, "keep": keep, "session": session}
            options["whole"] = not self.request.stream
            async with aclosing(service.stream(self.ids, self.params, request_id=self.id, **options)) as outputs:
                async for output in outputs:
                    if output.session is not None and service.epoch == epoch:
                        service.prefixes.keep(output.session, epoch=epoch)
                    yield output

    async def _stored(self, epoch: int) -> Session | None:
        """What is stored of the prompt's beginning, the system message read and stored first if it is new."""
        prefixes, common = self.service.prefixes, self.system
        if common and self.ids[: len(common)] == common and len(common) < len(self.ids):
            await prefixes.prepare(common, epoch=epoch, request_id=self.id)
        session = prefixes.find(self.ids, epoch=epoch)
        self.cached = 0 if session is None else len(session.tokens)
        return session

    async def _look(self, output: RequestOutput) -> dict[str, Any] | None:
        """What the first sample's cache holds; the texts are those of tokens that no look has told before."""
        watch, sample = self.service.watch, output.outputs[0]
        assert watch is not None
        if sample.session is not None:
            look = watch.of(self.id, sample.session.tokens, sample.session.state)
        else:
            look = await asyncio.to_thread(watch.look, self.id)
        if look is None:
            return None
        texts = pieces(self.service.llm.tokenizer, look.tokens)
        new, self._shown = texts[self._shown :], len(texts)
        told = {"first": len(texts) - len(new), "texts": new, "held": look.held, "lengths": look.lengths}
        return told | {"heads": look.heads, "bytes": look.bytes, "dense_bytes": look.dense_bytes}

    async def _vote(self) -> dict[str, Any]:
        if self.ballot is None:
            return {}
        assert self.last is not None
        problem = next((m.content for m in reversed(self.request.messages) if m.role == "user"), "") or ""
        text = problem if isinstance(problem, str) else "".join(part.text for part in problem)
        told = await self.ballot.count(self.last, problem=text)
        self.service.metrics.vote(outcome(told))
        return {"vote": told}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def _choice(self, sample: CompletionOutput) -> dict[str, Any]:
        said, calls = tools.split(sample.text, final=True) if self.calls else (sample.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": said or (None if calls else "")}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return {
            "index": sample.index,
            "message": message,
            "logprobs": self._logprobs(sample, 0),
            "finish_reason": _reason(sample, called=bool(calls)),
        }

    def _deltas(self, sample: CompletionOutput, before: "_Told") -> list[dict[str, Any]]:
        """What is new of a sample, and its end."""
        deltas: list[dict[str, Any]] = []
        final = sample.finished()
        if before.ended or not (sample.span[1] > sample.span[0] or final):
            return []
        if not before.begun:
            deltas.append({"role": "assistant", "content": ""})
        said, calls = tools.split(sample.text, final=final) if self.calls else (sample.text, [])
        if len(said) > before.characters:
            deltas.append({"content": said[before.characters :]})
        deltas += [{"tool_calls": [{"index": i} | _call(call)]} for i, call in enumerate(calls) if i >= before.calls]
        logprobs = self._logprobs(sample, before.tokens) if len(sample_ids(sample)) > before.tokens else None
        if logprobs is not None and not deltas:
            deltas.append({})
        choices = [{"index": sample.index, "delta": each, "logprobs": None, "finish_reason": None} for each in deltas]
        if choices:
            choices[-1]["logprobs"] = logprobs
        if final:
            reason = _reason(sample, called=bool(calls))
            choices.append({"index": sample.index, "delta": {}, "logprobs": None, "finish_reason": reason})
        before.begun, before.ended = True, final
        before.characters, before.calls, before.tokens = len(said), len(calls), len(sample_ids(sample))
        return choices

    def _logprobs(self, sample: CompletionOutput, start: int) -> dict[str, Any] | None:
        if sample.logprobs is None:
            return None
        ids = sample_ids(sample)
        return chat_logprobs(sample.logprobs[start:], ids[start:], self.request.top_logprobs or 0)


class _Told:
    """What a stream has said of a sample."""

    def __init__(self) -> None:
        self.begun = self.ended = False
        self.characters = self.calls = self.tokens = 0


def _reason(sample: CompletionOutput, *, called: bool) -> str | None:
    return "tool_calls" if called and sample.finish_reason == "stop" else sample.finish_reason


def _call(call: tools.Call) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
