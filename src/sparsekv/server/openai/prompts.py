"""From what a request says to token ids and SamplingParams. All of a tokenizer's work happens in one thread of its own,
so that a long text does not hold up the event loop, and a tokenizer is never entered twice."""

import asyncio
import inspect
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sparsekv.engine.llm import LLM
from sparsekv.engine.params import SamplingParams
from sparsekv.scaling.budget import end_marker, with_budget
from sparsekv.server.openai.errors import ApiError
from sparsekv.server.openai.requests import ChatRequest, CompletionRequest, Message, Tool

T = TypeVar("T")
_OPTIONS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens"),
)
_RESERVED = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"add_generation_prompt"}
_RESERVED |= {"messages", "add_special_tokens", "bos_token", "eos_token"}
"""Names that no variable of a template may have: they would change what the call does."""


class Prompts:
    """llm: its tokenizer; thinking_end: the end marker of thoughts, None = what the tokenizer knows."""

    def __init__(self, llm: LLM, *, thinking_end: str | None = None) -> None:
        self.llm, self.thinking_end = llm, thinking_end
        self.tokenizer = llm.tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sparsekv-tokenizer")
        template = getattr(self.tokenizer, "chat_template", None) or ""
        self.knows_tools = "tools" in (template if isinstance(template, str) else json.dumps(template))

    async def run(self, work: Callable[[], T]) -> T:
        """What `work`, which uses the tokenizer, returns."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    # Token ids

    async def encode(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        """Raises ApiError for ids outside the vocabulary and a prompt that leaves no room in the context."""
        if isinstance(prompt, str):
            ids: list[int] = await self.run(lambda: self.tokenizer.encode(prompt, add_special_tokens=special))
        else:
            ids = self._known(prompt)
        return self._fitting(ids)

    async def chat(
        self,
        messages: list[Message],
        *,
        tools: list[Tool] | None = None,
        template: dict[str, bool | int | str] | None = None,
    ) -> list[int]:
        """The conversation in the model's chat template. Raises ApiError where the template refuses it."""
        reserved = sorted(_RESERVED & set(template or {}))
        if reserved:
            raise ApiError(400, f"chat_template_kwargs may not hold {reserved[0]}; it is for the template's own names")
        if tools and not self.knows_tools:
            raise ApiError(400, "this model's chat template knows no tools; leave tools out", param="tools")
        turns = [turn(message) for message in messages]
        schemas = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None

        def work() -> list[int]:
            try:
                return self.llm.chat_prompt(turns, tools=schemas, chat_template_kwargs=template)
            except TemplateError as error:
                raise ApiError(400, f"the chat template refuses these messages ({error.message})") from None
            except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, OverflowError) as error:
                name = type(error).__name__
                raise ApiError(400, f"the chat template cannot make a prompt of these messages ({name})") from None

        return self._fitting(await self.run(work))

    async def system(self, messages: list[Message], **options: Any) -> list[int]:
        """The first message alone, where it is a system message that others follow; else nothing. options: as in
        chat."""
        if len(messages) < 2 or messages[0].role != "system":
            return []
        template = (options.pop("template") or {}) | {"add_generation_prompt": False}
        try:
            return await self.chat(messages[:1], template=template, **options)
        except ApiError:  # a template that wants a user
            return []

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids. Raises ApiError for ids outside the vocabulary."""
        known = self._known(ids)
        return await self.run(lambda: self.tokenizer.decode(known, skip_special_tokens=False))

    def _known(self, ids: list[int]) -> list[int]:
        vocabulary = self.llm.engine.vocab
        if any(token >= vocabulary for token in ids):
            raise ApiError(400, f"a token id is outside the vocabulary; ids are from 0 to {vocabulary - 1}")
        return ids

    def _fitting(self, ids: list[int]) -> list[int]:
        room = self.llm.engine.max_model_len
        if not ids:
            raise ApiError(400, "the prompt is empty; send at least one token")
        if len(ids) >= room:
            message = f"the prompt has {len(ids)} tokens and the context is {room}, the output included; shorten it"
            raise ApiError(400, message, code="context_length_exceeded")
        return ids

    # Sampling

    def params(
        self, request: ChatRequest | CompletionRequest, *, prompt: int, limit: int | None, logprobs: int | None
    ) -> SamplingParams:
        """prompt: its tokens; limit: tokens to generate at most, None = what the context leaves.

        Raises ValueError, one sentence, for values that do not go together.
        """
        given = {name: getattr(request, name) for name in _OPTIONS}
        bias = {int(token): value for token, value in (request.logit_bias or {}).items()} or None
        room = self.llm.engine.max_model_len - prompt
        params = SamplingParams(**given, logit_bias=bias, logprobs=logprobs, max_tokens=limit)
        if request.max_thinking_tokens is None:
            return params
        end = end_marker(self.tokenizer, self.thinking_end)
        most = room if limit is None else min(limit, room)
        answer = most - request.max_thinking_tokens - len(end)
        if answer < 1:
            raise ApiError(
                400,
                f"{most} tokens leave no room for an answer after {request.max_thinking_tokens} of thought and an end "
                f"marker of {len(end)}; raise max_tokens or lower max_thinking_tokens",
                param="max_thinking_tokens",
            )
        thinking = request.max_thinking_tokens
        return with_budget(params, self.tokenizer, thinking=thinking, answer=answer, marker=self.thinking_end)


def turn(message: Message) -> dict[str, Any]:
    """A message as chat templates take it: one text, and a call's arguments as an object."""
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    made: dict[str, Any] = {"role": message.role, "content": text}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            made[name] = getattr(message, name)
    if message.tool_calls:
        made["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _object(call)}}
            for call in message.tool_calls
        ]
    return made


def _object(call: Any) -> Any:
    try:
        return json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        raise ApiError(400, "a tool call's arguments are no JSON; send them as the model gave them") from None


def scored(params: SamplingParams, logprobs: int) -> SamplingParams:
    """The same, with log-probabilities of the prompt."""
    return replace(params, prompt_logprobs=logprobs)
