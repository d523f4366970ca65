"""What may be asked: OpenAI's fields, some of vLLM's, and ours. What is unknown or out of range is refused.

Ours: max_thinking_tokens (a budget of thought), vote (the answer of n samples), deadline (seconds).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sparsekv.scaling.answers import EXTRACTORS

MOST_PROMPTS = 1024
MOST_MESSAGES = 4096

Text = Annotated[str, Field(max_length=2**23)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**21)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_text(cls, data: Any) -> Any:
        """JSON can name half of a character of UTF-16, which no tokenizer and no reply can carry."""
        todo = [data]
        while todo:
            item = todo.pop()
            if isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise ValueError("a text holds half of a surrogate pair; send whole characters")
            if isinstance(item, dict):
                todo += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                todo += item
        return data


class StreamOptions(_Body):
    include_usage: bool = False


class VoteOptions(_Body):
    """How n samples amount to one answer."""

    answer: Literal["boxed", "letter", "line", "number", "text"] = "boxed"
    """Where a sample's answer stands; see docs/serve.md."""
    by: Literal["majority", "scorer"] = "majority"
    early_stop: bool = True
    """End the samples that can no longer change the majority."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        assert self.answer in EXTRACTORS
        return self


class _Sampled(_Body):
    model: str
    n: int = Field(1, ge=1, le=1024)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[Tokens, Field(max_length=1024)] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float], Field(max_length=1024)] | None
    ) = None
    min_tokens: int = Field(0, ge=0, lt=2**31)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_thinking_tokens: int | None = Field(None, ge=0, lt=2**31)
    vote: VoteOptions | None = None
    deadline: float | None = Field(None, gt=0, le=10**9)
    user: Text | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true; leave it out")
        return self


class CompletionRequest(_Sampled):
    """/v1/completions."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(16, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """One or several, texts or token ids."""
        if isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt) or [[]]  # type: ignore[return-value]


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class FunctionCall(_Body):
    name: str = Field(min_length=1, max_length=256)
    arguments: Text


class ToolCall(_Body):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: str | None = Field(None, max_length=256)
    refusal: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=256)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)


class FunctionSpec(_Body):
    name: str = Field(min_length=1, max_length=256)
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: FunctionSpec


class ResponseFormat(_Body):
    type: Literal["text"]


class _Templated(_Body):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    chat_template_kwargs: dict[str, bool | int | str] | None = None
    """Variables of the template, such as enable_thinking."""


class ChatRequest(_Templated, _Sampled):
    """/v1/chat/completions."""

    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: Literal["none", "auto"] | None = None
    """A call cannot be forced."""
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    watch: bool = False
    """Let a stream tell what the first sample's cache holds, as it changes."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.watch and not self.stream:
            raise ValueError("watch is for stream=true; leave it out")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(_Body):
    """/tokenize, vLLM's: a text, or a conversation."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DialRequest(_Body):
    """/dial: the compression ratio of what comes."""

    cr: float = Field(ge=1, le=10**6)


class DetokenizeRequest(_Body):
    """/detokenize, vLLM's."""

    model: str | None = None
    tokens: Tokens
