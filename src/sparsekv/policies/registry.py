"""Policies by name, for the command line and configuration files."""

from collections.abc import Callable
from typing import Any

from sparsekv.policies.base import Policy
from sparsekv.policies.streaming import StreamingPolicy

_BUILDERS: dict[str, Callable[..., Policy]] = {"dense": Policy, "streaming": StreamingPolicy}


def policy_names() -> list[str]:
    """The names that `make_policy` and `attach` know; "dms" needs eviction heads, which `attach` makes."""
    return sorted([*_BUILDERS, "dms"])


def make_policy(name: str, **options: Any) -> Policy:
    """Build a policy that needs no parameters of its own.

    Raises ValueError for an unknown name or option.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown policy {name!r}; use one of {', '.join(policy_names())}")
    try:
        return _BUILDERS[name](**options)
    except TypeError as error:
        detail = str(error).split("__init__() ")[-1]
        raise ValueError(f"policy {name!r} {detail}") from None
