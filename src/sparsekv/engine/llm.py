"""LLM: the engine as one object, with vLLM's calls.

llm = LLM("smollm2-135m", adapter="adapters/...", cr=4, kv_memory="2GiB")
outputs = llm.generate(prompts, SamplingParams(n=8, temperature=0.6, max_tokens=512, seed=0))
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsekv.engine.build import build_engine
from sparsekv.engine.config import EngineConfig, check_options
from sparsekv.engine.outputs import RequestOutput, Session
from sparsekv.engine.params import SamplingParams
from sparsekv.engine.streams import Streams
from sparsekv.modeling.adapter import AdapterConfig, read_adapter
from sparsekv.modeling.attach import attach, attachment_of, detach
from sparsekv.modeling.load import load_model
from sparsekv.policies import Policy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.registry import describe

Prompt = str | list[int]
"""Text, or token ids."""
_ENGINE_OPTIONS = {f.name for f in fields(EngineConfig)}


class LLM:
    """A model served from one pool of pages.

    model: an embedded model's name, a folder, a hub id, or a loaded model (attached already or not), with `tokenizer`
    where text is wanted. adapter and cr, or policy with its own options, as in sparsekv.attach; dense without either.
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
        self._streams = Streams(self.engine)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        session: Session | Sequence[Session] | None = None,
        keep: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts: one text, one list of token ids, or a list of either; outputs come in the same order.

        sampling_params: one for all, or one each. keep: each finished sample gets a `session`; session: continue this
        one (or one each), with the prompt as what comes next.

        Raises ValueError where a request can never fit or a prompt or session is not usable; none is run then.
        """
        if isinstance(prompts, torch.Tensor):
            raise ValueError("the prompts are a tensor; pass lists of token ids, such as tensor.tolist()")
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        many: list[Any] = [prompts] if single else list(prompts)
        params = _one_each("sampling_params", sampling_params or SamplingParams(), len(many))
        sessions = _one_each("session", session, len(many))
        requests = []
        try:
            for prompt, each, earlier in zip(many, params, sessions, strict=True):
                ids, text = self._encode(prompt, continued=earlier is not None)
                requests.append(self._streams.add(ids, each, text=text, keep=keep, session=earlier))
            return self._streams.run([request.id for request in requests])
        finally:
            for request in requests:
                if not request.finished:
                    self._streams.abort(request.id)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        keep: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several: lists of {"role": ..., "content": ...}, by the model's chat template."""
        many: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        return self.generate([self.chat_prompt(each) for each in many], sampling_params, keep=keep)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        session: Session | None = None,
        keep: bool = False,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's state whenever it grows, the finished one last. Text never shrinks and holds no half
        characters. Leaving the iteration cancels the request. Many streams run together.

        Raises ValueError as generate does.
        """
        ids, text = self._encode(prompt, continued=session is not None)
        params = sampling_params or SamplingParams()
        options: dict[str, Any] = {"text": text, "keep": keep, "session": session, "request_id": request_id}
        async for output in self._streams.stream(ids, params, **options):
            yield output

    def abort(self, request_id: str) -> None:
        """Cancel a request; its pages are free when this returns."""
        self._streams.abort(request_id)

    def chat_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the answer begins. Raises ValueError without a chat template."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError("this tokenizer has no chat template; use generate with a plain prompt")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def offset(self) -> float:
        """The dial: added to every eviction logit from the next step on. Raises ValueError for other policies."""
        return self._dms().offset

    @offset.setter
    def offset(self, value: float) -> None:
        self._dms().offset = value

    def set_cr(self, cr: float) -> None:
        """Turn the dial to a compression ratio of the adapter's table; what is stored stays stored."""
        if self._adapter is None:
            raise ValueError("cr picks a ratio of a trained adapter; make the LLM with adapter=..., or set offset")
        self.offset = self._adapter.offset_for(cr)

    def _dms(self) -> DMSPolicy:
        policy = attachment_of(self.model).policy
        if not isinstance(policy, DMSPolicy):
            raise ValueError(f"policy {policy.name!r} has no offset; use policy='dms' or an adapter")
        return policy

    def _encode(self, prompt: Prompt, *, continued: bool) -> tuple[list[int], str | None]:
        if not isinstance(prompt, str):
            return list(prompt), None
        if self.tokenizer is None:
            raise ValueError("this LLM has no tokenizer: pass tokenizer=..., or prompts as token ids")
        return self.tokenizer.encode(prompt, add_special_tokens=not continued), prompt


def _policy_options(policy: str | Policy | None, *, adapter: str | None) -> list[str]:
    """What attach takes beside: nothing for a Policy, which brings its own settings."""
    if adapter is not None:
        return ["budget", "page_size"] if policy == "dms-quest" else []
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
