"""A setting: which policy governs a model and how much it may hold, by budget or by ratio.

Where a policy has a budget, a ratio `cr` makes it out of a length: budget = (prompt + new tokens) / cr. Trained heads
are dialled to the ratio at that length instead, by the table of their adapter.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from sparsekv.modeling import contexts
from sparsekv.modeling.adapter import read_adapter
from sparsekv.modeling.attach import attach, attachment_of
from sparsekv.policies import Policy, make_policy
from sparsekv.policies.dms import DMSPolicy
from sparsekv.policies.quest import DMSQuestPolicy
from sparsekv.policies.registry import describe


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Raises ValueError, one sentence that names the mend, for what cannot be had."""

    policy: str = "dense"
    adapter: str | None = None
    """Trained heads: a folder or a hub id."""
    cr: float | None = None
    budget: int | None = None
    reads: float | None = None
    """Instead of a budget beside an adapter: the share of what its heads are to hold that a query reads."""
    options: dict[str, Any] = field(default_factory=dict)
    """Others of the policy's own, such as sinks."""

    def __post_init__(self) -> None:
        about = describe(self.policy)
        if about.needs_training and self.adapter is None:
            raise ValueError(
                f"policy {self.policy!r} needs trained eviction heads: pass --adapter with a folder that "
                "`sparsekv retrofit` has written, or a hub id"
            )
        if not about.needs_training and self.adapter is not None:
            raise ValueError(f"policy {self.policy!r} uses no adapter; leave out --adapter or --policy")
        unknown = sorted({*self.options, *(["budget"] if self.budget is not None else [])} - set(about.options))
        if unknown:
            takes = ", ".join([*about.options, *(["cr"] if about.budget else [])]) or "no option"
            raise ValueError(f"policy {self.policy!r} does not take {', '.join(unknown)}; it takes {takes}")
        if self.cr is not None and not about.budget and self.adapter is None:
            raise ValueError(
                f"policy {self.policy!r} has no budget that --cr could set; leave out --cr, name a --policy with a "
                "budget (see `sparsekv policies`), or pass --adapter"
            )
        if self.reads is not None:
            if not (about.budget and self.adapter is not None and self.budget is None and 0 < self.reads <= 1):
                raise ValueError(
                    f"reads is {self.reads:g}; it is a share above 0 and up to 1, for trained heads of which a policy "
                    "with a budget reads a part, and takes that budget's place"
                )
        elif about.budget and self.budget is None and (self.cr is None or self.adapter is not None):
            rule = "" if self.adapter is not None else " or --cr R"
            raise ValueError(f"policy {self.policy!r} needs a budget: pass --budget N{rule}")
        if not about.needs_training:
            self._policy(tokens=2**30)

    def arguments(self, *, tokens: int, output: int = 0) -> dict[str, Any]:
        """For sparsekv.attach and LLM. tokens: of prompt and output together; output: tokens of these for which a
        budget that is for the prompt alone leaves room."""
        given: dict[str, Any] = {"policy": self.policy, "adapter": self.adapter, "cr": self.cr, "budget": self.budget}
        if self.reads is not None:
            given["budget"] = self._to_read(tokens)
        if self.cr is not None:
            room = int(self.cr * output) if self.adapter is None and describe(self.policy).budgets_prompt else 0
            given["tokens"] = tokens - room
        return {name: value for name, value in given.items() if value is not None} | self.options

    def attach(self, model: PreTrainedModel) -> None:
        """Attach what `governing` then turns to each length: trained heads, or dense. Raises ValueError as attach."""
        if self.adapter is None:
            attach(model, policy="dense")
        else:
            attach(model, **replace(self, cr=None).arguments(tokens=0))

    @contextmanager
    def governing(self, model: PreTrainedModel, *, tokens: int, output: int = 0) -> Iterator[Policy]:
        """Within, a model is governed as this says for sequences of `tokens` tokens, prompt and output together (and
        output as in `arguments`). It was attached by `attach` of this or a setting with the same policy and adapter;
        dense is what it was before that.

        Raises ValueError for a budget that the policy or the model cannot have.
        """
        if self.policy == "dense":
            with contexts.original(model):
                yield attachment_of(model).policy
            return
        if self.adapter is None:
            policy = self._policy(tokens=tokens, output=output)
            with contexts.governed(model, policy):
                yield policy
            return
        policy = attachment_of(model).policy
        assert isinstance(policy, DMSPolicy)
        offset = 0.0 if self.cr is None else read_adapter(self.adapter)[0].offset_for(self.cr, tokens=tokens)
        with contexts.dialled(policy, offset), self._reading(policy, tokens):
            yield policy

    def _reading(self, policy: Policy, tokens: int) -> AbstractContextManager[None]:
        if self.reads is None:
            return nullcontext()
        assert isinstance(policy, DMSQuestPolicy)
        return contexts.reading(policy, self._to_read(tokens))

    def _to_read(self, tokens: int) -> int:
        assert self.reads is not None
        return max(1, math.ceil(self.reads * tokens / (self.cr or 1)))

    def _policy(self, *, tokens: int, output: int = 0) -> Policy:
        options = self.arguments(tokens=tokens, output=output)
        return make_policy(options.pop("policy"), **options)


def policy_of(adapter: str | None) -> str:
    """The policy that an adapter was trained for; dense without one. Raises ValueError where there is none."""
    return "dense" if adapter is None else read_adapter(adapter)[0].policy


def budget_of(policy: Policy) -> int | None:
    """Tokens that it may hold, or Quest may read; None where there is no such bound."""
    return getattr(policy, "budget", None)
