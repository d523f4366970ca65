"""attach: let a policy govern the attention of any Hugging Face decoder, without copying or patching its code.

Three public seams of Transformers carry it: AttentionInterface (the attention function), a forward pre-hook on each
attention module (its input, which the eviction heads read) and the Cache argument. A `generate` without that argument
makes its own SparseCache. What is left on the model is data that copies and pickles with it.
"""

from functools import partial
from os import PathLike
from typing import Any

from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from sparsekv.dms import EvictionHead, NeuronSource
from sparsekv.modeling import adapter as adapters
from sparsekv.modeling.attached import ATTACHED, ATTACHMENT, CALL, AttachedLayer, Attachment, PagedCache
from sparsekv.modeling.attention import NAME, register
from sparsekv.modeling.attention_layers import AttentionLayers, attention_layers
from sparsekv.modeling.lora import MergedLora
from sparsekv.modeling.queries import dmc, neuron
from sparsekv.policies import Policy, make_policy
from sparsekv.policies.dmc import DMCPolicy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.quest import DMSQuestPolicy
from sparsekv.policies.registry import build
from sparsekv.policies.streaming import SlidingWindowPolicy

TRAINED: dict[str, type[DMSPolicy]] = {"dms": DMSPolicy, "dms-quest": DMSQuestPolicy, "dmc": DMCPolicy}
"""Policies whose decisions are learned: eviction heads make them, or a neuron."""
_PREPARE_CACHE = "_prepare_cache_for_generation"


def attach(
    model: PreTrainedModel,
    *,
    policy: str | Policy | None = None,
    adapter: str | None = None,
    cr: float | None = None,
    tokens: int | None = None,
    **options: Any,
) -> Attachment:
    """Let a policy govern every full-attention layer of `model`; sliding-window layers keep their own window.

    policy: a name (see policies.policy_names) with its options, such as policy="tova", budget=512 or policy="dms",
    window=64, lag=0 (untrained heads; neuron=dms.NeuronSource() for a checkpoint whose queries carry the logits), or
    policy="dmc" for a checkpoint trained so, or a Policy.
    adapter: a folder or hub id with trained eviction heads, and LoRA where they were trained with it, which is merged
    into the weights until detach; with policy="dms-quest" its heads decide what is held, and `budget` what is read.
    cr: with an adapter, the compression ratio to serve it at, between 1 and the adapter's largest (None = as trained);
    with a policy that has a budget, that budget is tokens / cr.
    tokens: the length that cr is meant for, input and output together; an adapter's default is that of its table.

    Raises ValueError where the model cannot be attached (the sentence names the reason), is attached already, or where
    the adapter is for another model or the options do not fit.
    """
    _check_call(model, policy, adapter=adapter, cr=cr, tokens=tokens)
    layers = attention_layers(model)
    loaded = None
    if adapter is not None:
        loaded = _load(model, policy, adapter=adapter, cr=cr, tokens=tokens, options=options)
        options |= loaded.config.policy_options()
        options["offset"] = 0.0 if cr is None else loaded.config.offset_for(cr, tokens=tokens)
        policy = policy or loaded.config.policy
    elif policy in TRAINED and cr is not None:
        raise ValueError(f"cr picks a ratio of trained heads: pass adapter=... beside policy={policy!r}")
    heads: dict[int, EvictionHead] = {}
    source: NeuronSource | None = None
    if policy in TRAINED:
        policy, heads, source = _trained(str(policy), layers, options)
    elif isinstance(policy, str):
        policy = make_policy(policy, cr=cr, tokens=tokens, **options)
    elif options or cr is not None:
        given = ["cr"] * (cr is not None) + sorted(options)
        raise ValueError(f"a Policy object brings its own settings; leave out {', '.join(given)}")
    assert isinstance(policy, Policy)
    check_budget(policy, layers.max_tokens)
    lora = None
    if loaded is not None:
        loaded.copy_into(heads)
        lora = MergedLora(model, loaded.lora, scale=loaded.config.lora_alpha / loaded.config.r) if loaded.lora else None
    attachment = _install(model, layers, policy=policy, heads=heads, source=source)
    if isinstance(policy, DMCPolicy):
        try:
            dmc.check_rotation(model)
        except ValueError:
            detach(model)
            raise
    if lora is not None:
        attachment.lora = lora
        lora.put_in()
        attachment.undo.append(lora.remove)
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Restore the model as it was before attach. Raises ValueError if it is not attached."""
    for undo in reversed(attachment_of(model).undo):
        undo()


def attachment_of(model: PreTrainedModel) -> Attachment:
    """The model's Attachment. Raises ValueError if it has none."""
    found = getattr(model, ATTACHMENT, None)
    if found is None:
        raise ValueError("this model is not attached; call sparsekv.attach(model, policy=... or adapter=...) first")
    return found


def heads(model: PreTrainedModel) -> list[EvictionHead]:
    """The eviction heads of the governed layers in order: modules with weight [kv_heads, hidden_size] and bias
    [kv_heads]. Raises ValueError if the model is not attached with DMS."""
    policy = attachment_of(model).policy
    if not isinstance(policy, DMSPolicy):
        raise ValueError(f"policy {policy.name!r} has no eviction heads; attach with policy='dms' or an adapter")
    found = [source for source in policy.sources if isinstance(source, EvictionHead)]
    if not found:
        raise ValueError("this model has no eviction heads: its queries carry the logits, or a policy of your own does")
    return found


def _check_call(
    model: PreTrainedModel, policy: str | Policy | None, *, adapter: str | None, cr: float | None, tokens: int | None
) -> None:
    """Raises ValueError for arguments that no model could be attached by."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"attach takes a Transformers model, and this is a {type(model).__name__}")
    _check_types(policy, adapter=adapter, numbers={"cr": cr, "tokens": tokens})
    if hasattr(model, ATTACHMENT):
        raise ValueError("this model is attached already; call sparsekv.detach(model) first")
    if policy is None and adapter is None:
        raise ValueError("attach takes a policy or an adapter: pass policy=... or adapter=...")
    if adapter is not None and policy not in (None, *TRAINED):
        raise ValueError(
            f"an adapter's heads are for policy 'dms' or 'dms-quest', not {policy!r}; leave out the policy"
        )


def _check_types(policy: Any, *, adapter: Any, numbers: dict[str, Any]) -> None:
    if not isinstance(policy, str | Policy | None):
        raise ValueError(f"policy is {policy!r}; pass a name, or a Policy that was made")
    if not isinstance(adapter, str | PathLike | None):
        raise ValueError(f"adapter is {adapter!r}; pass a folder or a hub id")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{name} is {value!r}; use a number")


def _load(
    model: PreTrainedModel,
    policy: str | Policy | None,
    *,
    adapter: str,
    cr: float | None,
    tokens: int | None,
    options: dict[str, Any],
) -> adapters.LoadedAdapter:
    """Raises ValueError for an adapter that does not fit the model, the policy or the options."""
    own = sorted(set(options) - ({"budget", "page_size"} if policy == "dms-quest" else set()))
    if own:
        raise ValueError(f"an adapter brings its own settings; leave out {', '.join(own)}")
    if tokens is not None and cr is None:
        raise ValueError("tokens is the length that cr is meant for; pass cr=... beside it")
    loaded = adapters.load_adapter(adapter, model)
    trained_for = loaded.config.policy
    if "dmc" in (policy, trained_for) and policy not in (None, trained_for):
        raise ValueError(f"the adapter {adapter} is for policy {trained_for!r}, not {policy!r}; leave out the policy")
    return loaded


def _trained(
    name: str, layers: AttentionLayers, options: dict[str, Any]
) -> tuple[DMSPolicy, dict[int, EvictionHead], NeuronSource | None]:
    """The policy, and what decides for it: new heads by layer, or a neuron (taken out of the options)."""
    heads: dict[int, EvictionHead] = {}
    source: NeuronSource | None = options.pop("neuron", None)
    if name == "dmc":
        source = NeuronSource() if source is None else source
        dmc.check(layers, source)
    elif source is not None:
        neuron.check(layers, source)
    else:
        heads = {i: _new_head(layers, i) for i in layers.governed}
    return _dms_policy(name, layers, heads, options), heads, source


def _new_head(layers: AttentionLayers, index: int) -> EvictionHead:
    device = next(layers.modules[index].parameters()).device
    return EvictionHead(layers.hidden_size, layers.kv_heads, device=device)


def _dms_policy(
    name: str, layers: AttentionLayers, heads: dict[int, EvictionHead], options: dict[str, Any]
) -> DMSPolicy:
    read = partial(dmc.merge_logits, kv_heads=layers.kv_heads) if name == "dmc" else neuron.as_read
    sources = [heads.get(i, read) if w is None else None for i, w in enumerate(layers.windows)]
    policy = build(partial(TRAINED[name], sources), name, options)
    assert isinstance(policy, DMSPolicy)
    return policy


def check_budget(policy: Policy, context: int) -> None:
    """Raises ValueError for a budget beyond the model's context."""
    budget = getattr(policy, "budget", None)
    if budget is not None and budget > context:
        raise ValueError(f"budget is {budget} and the model's context is {context} tokens; lower it")


def _install(
    model: PreTrainedModel,
    layers: AttentionLayers,
    *,
    policy: Policy,
    heads: dict[int, EvictionHead],
    source: NeuronSource | None,
) -> Attachment:
    attachment = Attachment(
        policy=policy,
        kv_heads=layers.kv_heads,
        group=layers.group,
        head_dim=layers.head_dim,
        max_tokens=layers.max_tokens,
    )
    register()
    for index, module in enumerate(layers.modules):
        window = layers.windows[index]
        attached = AttachedLayer(
            layer=index, policy=policy if window is None else SlidingWindowPolicy(window), attachment=attachment
        )
        attachment.layers.append(attached)
        setattr(module, ATTACHED, attached)
        hook = module.register_forward_pre_hook(_read_input, with_kwargs=True)
        attachment.undo += [hook.remove, partial(delattr, module, ATTACHED)]
        if source is not None and window is None:
            if isinstance(policy, DMCPolicy):
                attachment.undo += dmc.install(layers, index, attached=attached, source=source)
            else:
                attachment.undo.append(neuron.install(layers, index, attached=attached, source=source))
        if index in heads:
            module.add_module(adapters.HEAD, heads[index])
            attachment.undo.append(partial(delattr, module, adapters.HEAD))
    previous = layers.text_config._attn_implementation
    layers.set_implementation(model, NAME)
    attachment.undo.append(partial(layers.set_implementation, model, previous))
    if isinstance(model, GenerationMixin):
        # generate makes its cache in this method, for which Transformers has no registry: only this model's is changed.
        setattr(model, _PREPARE_CACHE, partial(_prepare_cache, model))
        attachment.undo.append(partial(delattr, model, _PREPARE_CACHE))
    setattr(model, ATTACHMENT, attachment)
    attachment.undo.append(partial(delattr, model, ATTACHMENT))
    return attachment


def _read_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Remember the attention layer's input and cache for `sparse_attention`."""
    CALL.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))  # GPT-NeoX's name
    CALL.cache = cache if isinstance(cache, PagedCache) else None


def _prepare_cache(
    model: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """GenerationMixin._prepare_cache_for_generation of an attached model: a call without a cache gets a SparseCache.

    Raises ValueError where the call names a cache of Transformers'.
    """
    from sparsekv.modeling.cache import SparseCache  # which imports this module

    given, asked = model_kwargs.get("past_key_values"), generation_config.cache_implementation
    default = getattr(model.generation_config, "cache_implementation", None)  # Gemma's is "hybrid"
    if given is not None and not isinstance(given, PagedCache) or asked not in (None, default):
        name = repr(asked) if given is None else type(given).__name__
        raise ValueError(
            f"this model is attached to sparsekv and cannot use the cache {name}: leave it out, for a SparseCache of "
            "the call's own, pass past_key_values=sparsekv.SparseCache(model), or detach(model) first"
        )
    generation_config.cache_implementation = None
    if given is None and generation_config.use_cache is not False:
        model_kwargs["past_key_values"] = SparseCache(model)
    else:
        getattr(type(model), _PREPARE_CACHE)(model, generation_config, model_kwargs, *args, **kwargs)
