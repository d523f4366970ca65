"""/v1/completions: one or several prompts, n continuations of each, whole or as they grow."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from sparsekv.engine.outputs import CompletionOutput, RequestOutput
from sparsekv.engine.params import SamplingParams
from sparsekv.server.openai.errors import ApiError
from sparsekv.server.openai.requests import CompletionRequest
from sparsekv.server.openai.shapes import completion_logprobs, sample_ids, usage
from sparsekv.server.openai.votes import Ballot, outcome
from sparsekv.server.service import Service


class Completion:
    """One request under way. texts: the prompts as an echo shows them, empty without one."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        prompts: list[list[int]],
        params: list[SamplingParams],
        *,
        texts: list[str],
    ) -> None:
        self.service, self.request = service, request
        self.prompts, self.params, self.texts = prompts, params, texts
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.samples = sum(each.n for each in params)
        self.ballot = None
        if request.vote is not None:
            if len(prompts) > 1:
                raise ApiError(400, "a vote is on one prompt's samples; send one prompt", param="vote")
            self.ballot = Ballot(options=request.vote, samples=params[0].n, scorer=service.settings.scorer)
        self.last: dict[int, RequestOutput] = {}

    async def whole(self) -> dict[str, Any]:
        """text_completion."""
        async with aclosing(self._outputs()) as outputs:
            async for index, output in outputs:
                self.last[index] = output
        done = [self.last[i] for i in range(len(self.prompts))]
        choices = [self._choice(i, sample) for i, output in enumerate(done) for sample in output.outputs]
        return self._head() | {"choices": choices, "usage": usage(done)} | await self._vote()

    async def pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        """The same object, piece by piece."""
        told = [(0, 0, False)] * self.samples
        with_usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        head = self._head() | ({"usage": None} if with_usage else {})
        async with aclosing(self._outputs()) as outputs:
            async for index, output in outputs:
                self.last[index] = output
                for sample in output.outputs:
                    choice = self._choice(index, sample, since=told[self._number(index, sample)])
                    if choice is not None:
                        yield head | {"choices": [choice]}
                        told[choice["index"]] = len(sample.text), len(sample_ids(sample)), sample.finished()
        counted = await self._vote()
        if counted:
            yield head | {"choices": []} | counted
        if with_usage:
            yield head | {"choices": [], "usage": usage(self.last.values())}

    async def _outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        stop_when = None if self.ballot is None else self.ballot.stop_when
        with self.service.admitted(self.samples):
            options: dict[str, Any] = {"stop_when": stop_when, "whole": not self.request.stream}
            stream = self.service.streams(self.prompts, self.params, request_id=self.id, **options)
            async with aclosing(stream) as outputs:
                async for index, output in outputs:
                    yield index, output

    async def _vote(self) -> dict[str, Any]:
        if self.ballot is None:
            return {}
        prompt = self.request.prompts()[0]
        problem = prompt if isinstance(prompt, str) else self.service.llm.tokenizer.decode(prompt)
        told = await self.ballot.count(self.last[0], problem=problem)
        self.service.metrics.vote(outcome(told))
        return {"vote": told}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.request.model}

    def _number(self, prompt: int, sample: CompletionOutput) -> int:
        return prompt * self.request.n + sample.index

    def _choice(
        self, prompt: int, sample: CompletionOutput, *, since: tuple[int, int, bool] | None = None
    ) -> dict[str, Any] | None:
        """A sample, or what is new of it since so many characters and tokens; None where nothing is."""
        characters, tokens, ended = since or (0, 0, False)
        first = since is None or (characters, tokens) == (0, 0)
        text, ids = sample.text[characters:], sample_ids(sample)
        logprobs = None
        if sample.logprobs is not None and len(ids) > tokens:
            logprobs = self._logprobs(prompt, sample, tokens, echo=self.request.echo and first)
        if since is not None and (ended or not (text or logprobs or sample.finished())):
            return None
        if self.request.echo and first:
            text = self.texts[prompt] + text
        return {
            "index": self._number(prompt, sample),
            "text": text,
            "logprobs": logprobs,
            "finish_reason": sample.finish_reason,
        }

    def _logprobs(self, prompt: int, sample: CompletionOutput, start: int, *, echo: bool) -> dict[str, Any]:
        output, ids = self.last[prompt], sample_ids(sample)
        entries: list[Any] = list((sample.logprobs or [])[start:])
        ids, offset = ids[start:], 0
        if echo:
            entries = [*(output.prompt_logprobs or []), *entries]
            ids = [*output.prompt_token_ids, *ids]
        elif self.request.echo:
            offset = len(self.texts[prompt])
        count, decode = self.request.logprobs or 0, self.service.llm.tokenizer.decode
        return completion_logprobs(entries, ids, count, decode=decode, offset=offset)
