"""Policies by name, for the command line, configuration files and `sparsekv policies`."""

import inspect
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sparsekv.policies.base import Policy
from sparsekv.policies.dmc import DMCPolicy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.h2o import H2OPolicy
from sparsekv.policies.quest import DMSQuestPolicy, QuestPolicy, quest_page
from sparsekv.policies.random import RandomPolicy
from sparsekv.policies.snapkv import SnapKVPolicy
from sparsekv.policies.streaming import StreamingPolicy
from sparsekv.policies.tova import TOVAPolicy

METHODS: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (
        Policy,
        DMCPolicy,
        DMSPolicy,
        DMSQuestPolicy,
        H2OPolicy,
        QuestPolicy,
        RandomPolicy,
        SnapKVPolicy,
        StreamingPolicy,
        TOVAPolicy,
    )
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a user should know of a policy before choosing it."""

    name: str
    about: str
    options: list[str]
    """What it takes, beside `cr`."""
    budget: bool
    """Whether it takes `budget`, and so `cr` by the rule (input + output tokens) / cr."""
    budgets_prompt: bool
    """Whether that is for the prompt alone, and all that follows is kept beyond it."""
    needs_training: bool
    needs_weights: bool
    """Whether it reads attention weights, which costs a second pass over the keys, at each step or once a prompt."""
    frees_memory: bool
    recordable: bool
    """Whether decode steps run in CUDA graphs."""
    exact_under: list[str]
    """What leaves its outputs as they would be without."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def policy_names() -> list[str]:
    """The names that `make_policy` and `attach` know; DMS and DMC decide by parameters, which `attach` makes."""
    return sorted(METHODS)


def describe(name: str) -> Method:
    """Raises ValueError for an unknown name."""
    kind = _kind(name)
    taken = inspect.signature(kind).parameters
    options = [o for o in taken if o not in ("args", "options", "sources", "page_size")]
    if kind.trained:
        options = sorted({*options, *(("window", "lag") if "options" in taken else ())})  # DMS's own
    return Method(
        name=name,
        about=(inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " "),
        options=options,
        budget="budget" in options,
        budgets_prompt=kind.budgets_prompt,
        needs_training=kind.trained,
        needs_weights=kind.ranks_by_weights,
        frees_memory=kind.frees and kind is not Policy,
        recordable=kind.recordable,
        exact_under=["fork", "prefix reuse", "swap"],
    )


def make_policy(name: str, *, cr: float | None = None, tokens: int | None = None, **options: Any) -> Policy:
    """Build a policy that needs no parameters of its own. cr: a budget of tokens / cr, where tokens is the length of
    input and output together.

    Raises ValueError for an unknown name or option, or a ratio that cannot be turned into a budget.
    """
    kind = _kind(name)
    if kind.trained:
        raise ValueError(
            f"policy {name!r} has learned what it decides: use sparsekv.attach, which makes or loads its parameters"
        )
    if cr is not None:
        options |= budget_options(name, cr=cr, tokens=tokens, given=options)
    return build(partial(kind), name, options)


def budget_options(name: str, *, cr: float, tokens: int | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a ratio stands for. Raises ValueError where there is no such rule."""
    if not describe(name).budget:
        raise ValueError(f"policy {name!r} has no budget that cr could set; leave cr out, or pass an adapter")
    if "budget" in given:
        raise ValueError("cr and budget both say how much is held: pass one of them")
    if not cr >= 1:
        raise ValueError(f"cr is {cr:g}; it is tokens seen over tokens held, so use 1 or more")
    if tokens is None:
        raise ValueError(
            f"cr={cr:g} makes a budget for policy {name!r} out of a length: pass tokens=..., those of input and output "
            "together, or budget=..."
        )
    page = {"page_size": quest_page(cr)} if "quest" in name and "page_size" not in given else {}
    return {"budget": -int(-tokens // cr)} | page


def build(kind: Any, name: str, options: dict[str, Any]) -> Policy:
    """kind(**options). Raises ValueError for an option that it does not know or lacks."""
    try:
        return kind(**options)
    except TypeError as error:
        detail = str(error).split("__init__() ")[-1]
        raise ValueError(f"policy {name!r} {detail}; it takes {', '.join(describe(name).options) or 'none'}") from None


def _kind(name: str) -> type[Policy]:
    if name not in METHODS:
        raise ValueError(f"unknown policy {name!r}; use one of {', '.join(policy_names())}")
    return METHODS[name]
