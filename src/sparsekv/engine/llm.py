"""LLM: the engine as one object, with vLLM's calls.

llm = LLM("smollm2-135m", adapter="adapters/...", cr=4, kv_memory="2GiB")
outputs = llm.generate(prompts, SamplingParams(n=8, temperature=0.6, max_tokens=512, seed=0))
"""

import gc
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, Self, TypeVar

import torch
from transformers import PreTrainedModel

from sparsekv.engine.build import build_engine
from sparsekv.engine.config import EngineConfig, check_options
from sparsekv.engine.outputs import RequestOutput, Session
from sparsekv.engine.params import SamplingParams
from sparsekv.engine.progress import Progress
from sparsekv.engine.schedule.request import StopWhen
from sparsekv.engine.streams import Streams, Ticket
from sparsekv.modeling.adapter import AdapterConfig, read_adapter
from sparsekv.modeling.attach import attach, attachment_of, detach
from sparsekv.modeling.load import load_model
from sparsekv.policies import Policy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.registry import describe

Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, or either as vLLM names them: {"prompt": ...}, {"prompt_token_ids": ...}."""
T = TypeVar("T")
_ENGINE_OPTIONS = {f.name for f in fields(EngineConfig)}


class LLM:
    """A model served from one pool of pages.

    model: an embedded model's name, a folder, a hub id, or a loaded model (attached already or not), with `tokenizer`
    where text is wanted. adapter with cr (and tokens, the length that cr is meant for), or policy with its own options,
    as in sparsekv.attach; dense without either.
    The other options are EngineConfig's (kv_memory, max_num_seqs, max_num_batched_tokens, max_model_len, page_size,
    enforce_eager, async_scheduling).

    Raises ValueError for a model that cannot be attached, an adapter of another model, or an unknown or bad option.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        adapter: str | None = None,
        cr: float | None = None,
        policy: str | Policy | None = None,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        check_options(options, policy=_policy_options(policy, adapter=adapter))
        config = EngineConfig(**{k: v for k, v in options.items() if k in _ENGINE_OPTIONS})
        options = {k: v for k, v in options.items() if k not in _ENGINE_OPTIONS}
        if isinstance(model, str):
            model, loaded = load_model(model, dtype=dtype, device=device)
            tokenizer = loaded if tokenizer is None else tokenizer
        elif not isinstance(model, PreTrainedModel):
            raise ValueError(f"model is a {type(model).__name__}; pass a name, a folder or a Transformers model")
        elif dtype is not None or device is not None:
            raise ValueError("dtype and device are for models loaded by name; move this one before passing it")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._adapter: AdapterConfig | None = None if adapter is None else read_adapter(adapter)[0]
        attached = _attached(model)
        if adapter is not None or policy is not None or options or cr is not None or not attached:
            policy = "dense" if policy is None and adapter is None else policy
            attach(model, adapter=adapter, cr=cr, policy=policy, **options)
        try:
            self.engine = build_engine(model, config, tokenizer=tokenizer, ratio=1.0 if cr is None else cr)
        except BaseException:
            if not attached:
                detach(model)
            raise
        self.partial: list[RequestOutput] = []
        """What the requests of the last `generate` had, where it was interrupted or failed; else empty."""
        self._streams = Streams(self.engine)

    def close(self) -> None:
        """Free the pool and end the engine's thread; requests that are left fail. Later calls raise ValueError.

        Dropping the last reference does the same when Python collects it.
        """
        self._streams.close()
        self.__dict__.pop("engine", None)
        gc.collect()  # a cache and its layers know each other

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        session: Session | Sequence[Session] | None = None,
        keep: bool = False,
        stop_when: StopWhen | Sequence[StopWhen] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts: one, or a list of them; outputs come in the same order.

        sampling_params: one for all, or one each. use_tqdm: a progress bar with tokens per second; None = for several
        prompts on a terminal. keep: each finished sample gets a `session`; session: continue this one (or one each),
        with the prompt as what comes next. stop_when (one, or one each): called with a request's finished samples
        whenever one more is, in the engine's thread, and it must not raise; True ends the others at once, with reason
        "abort" (scaling.early: a vote that is decided).

        Raises ValueError where a request can never fit or a prompt or session is not usable; none is run then. After
        Ctrl-C or a step that failed, `partial` holds what there was and the next call is right.
        """
        if isinstance(prompts, torch.Tensor):
            raise ValueError("the prompts are a tensor; pass lists of token ids, such as tensor.tolist()")
        single = isinstance(prompts, str | dict) or (bool(prompts) and isinstance(prompts[0], int))
        many: list[Any] = [prompts] if single else list(prompts)
        params = _one_each("sampling_params", sampling_params or SamplingParams(), len(many))
        sessions = _one_each("session", session, len(many))
        stops = _one_each("stop_when", stop_when, len(many))
        specs = [
            self._spec(prompt, each, keep=keep, session=earlier) | {"stop_when": stop}
            for prompt, each, earlier, stop in zip(many, params, sessions, stops, strict=True)
        ]
        ticket, self.partial = Ticket(), []
        try:
            with Progress(len(many), show=use_tqdm) as progress:
                self._streams.run(specs, ticket, finished=progress.update)
        except BaseException:
            self.partial = [request.output() for request in ticket.requests]
            raise
        return [request.output() for request in ticket.requests]

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        keep: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several: lists of {"role": ..., "content": ...}, by the model's chat template.

        tools: JSON schemas of functions, and chat_template_kwargs: what else the template knows, such as
        enable_thinking.
        """
        many: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        options: dict[str, Any] = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        prompts = [self.chat_prompt(each, **options) for each in many]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, keep=keep)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        session: Session | None = None,
        keep: bool = False,
        stop_when: StopWhen | None = None,
        pace: Callable[[], float] = lambda: 0.0,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's state whenever it grows, the finished one last; a slow reader gets the newest alone. Text
        never shrinks and holds no half characters. Leaving the iteration cancels the request. Many streams run
        together. stop_when: as in generate. pace: asked after each state for the seconds in which no other but the last
        is wanted; states that nobody takes cost nothing.

        Raises ValueError as generate does.
        """
        spec = self._spec(prompt, sampling_params or SamplingParams(), keep=keep, session=session)
        spec |= {"request_id": request_id, "stop_when": stop_when}
        async for output in self._streams.stream(spec, pace=pace):
            yield output

    def abort(self, request_id: str) -> None:
        """Cancel a request; its pages are free when this returns. Its stream ends with an output of reason "abort"."""
        self._streams.abort(request_id)

    @property
    def alive(self) -> bool:
        """False once closed, or after a failure that the engine could not recover from."""
        return self._streams.alive

    def between_steps(self, work: Callable[[], T]) -> T:
        """Have the engine's thread do something while no step runs, such as turning the dial, and return what it gives.
        Raises what it raises, and ValueError after `close`."""
        return self._streams.between_steps(work)

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation up to where the answer begins. Raises ValueError without a chat template."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError("this tokenizer has no chat template; use generate with a plain prompt")
        options = {"add_generation_prompt": True} | (chat_template_kwargs or {}) | {"tokenize": False}
        text = self.tokenizer.apply_chat_template(messages, tools=tools, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def offset(self) -> float:
        """The dial: added to every eviction logit from the next step on. Raises ValueError for other policies."""
        return self._dms().offset

    @offset.setter
    def offset(self, value: float) -> None:
        self._dms().offset = value

    def set_cr(self, cr: float, *, tokens: int | None = None) -> None:
        """Turn the dial to a compression ratio of the adapter's table, for sequences of `tokens` tokens; what is stored
        stays stored."""
        if self._adapter is None:
            raise ValueError("cr picks a ratio of a trained adapter; make the LLM with adapter=..., or set offset")
        self.offset = self._adapter.offset_for(cr, tokens=tokens)

    @property
    def max_cr(self) -> float:
        """The largest compression ratio that the adapter's table reaches. Raises ValueError without an adapter."""
        if self._adapter is None:
            raise ValueError("max_cr is of a trained adapter; make the LLM with adapter=...")
        return self._adapter.max_cr

    def _dms(self) -> DMSPolicy:
        policy = attachment_of(self.model).policy
        if not isinstance(policy, DMSPolicy):
            raise ValueError(f"policy {policy.name!r} has no offset; use policy='dms' or an adapter")
        return policy

    def _spec(self, prompt: Prompt, params: SamplingParams, *, keep: bool, session: Session | None) -> dict[str, Any]:
        """The arguments of Engine.add."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(params).__name__}; pass SamplingParams(...)")
        ids, text = self._encode(prompt, continued=session is not None)
        return {"prompt": ids, "params": params, "text": text, "keep": keep, "session": session}

    def _encode(self, prompt: Prompt, *, continued: bool) -> tuple[list[int], str | None]:
        if isinstance(prompt, dict):
            known = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
            if not known or set(prompt) - {"prompt_token_ids", "prompt"}:
                raise ValueError(
                    f"the prompt is a dict of {', '.join(map(repr, prompt)) or 'nothing'}; give it 'prompt' (text) or "
                    "'prompt_token_ids'"
                )
            ids, text = self._encode(prompt[known[0]], continued=continued)
            return ids, prompt.get("prompt", text)
        if not isinstance(prompt, str):
            return list(prompt), None
        if self.tokenizer is None:
            raise ValueError("this LLM has no tokenizer: pass tokenizer=..., or prompts as token ids")
        return self.tokenizer.encode(prompt, add_special_tokens=not continued), prompt


def _policy_options(policy: str | Policy | None, *, adapter: str | None) -> list[str]:
    """What attach takes beside: nothing for a Policy, which brings its own settings."""
    if adapter is not None:
        return ["tokens", "budget", "page_size"] if policy == "dms-quest" else ["tokens"]
    return [*describe(policy).options, "tokens", "neuron"] if isinstance(policy, str) else []


def _attached(model: PreTrainedModel) -> bool:
    try:
        attachment_of(model)
    except ValueError:
        return False
    return True


def _one_each(name: str, given: Any, count: int) -> Iterable[Any]:
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} prompts; pass one, or one for each prompt")
    return given
