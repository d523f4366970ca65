"""The ragged cache that the policies of a model's layers need."""

from collections.abc import Sequence

import torch

from sparsekv.cache.pages import PagePool
from sparsekv.cache.ragged import RaggedCache
from sparsekv.cache.state import HeadShape, State
from sparsekv.policies.base import Policy

PAGE_SIZE = 32
"""Slots of a page, where neither the user nor a policy says."""


def choose_page_size(policies: Sequence[Policy], asked: int | None) -> int:
    """Raises ValueError where a policy needs pages of another size than asked for."""
    wanted = next((policy for policy in policies if policy.page_size is not None), None)
    if wanted is None or wanted.page_size is None:
        return PAGE_SIZE if asked is None else asked
    if asked not in (None, wanted.page_size):
        raise ValueError(
            f"page_size is {asked} and policy {wanted.name!r} reads pages of {wanted.page_size} tokens; leave it out"
        )
    return wanted.page_size


def page_bytes(policies: Sequence[Policy], shape: HeadShape, *, page_size: int) -> int:
    """Bytes of a page, with what the policies remember of it."""
    pool = PagePool(
        1, page_size=page_size, head_dim=shape.dim, dtype=shape.dtype, device="meta", states=_all(policies, shape)
    )
    return pool.page_bytes


def allocate(
    policies: Sequence[Policy],
    shape: HeadShape,
    *,
    pages: int,
    page_size: int,
    rows: int,
    max_tokens: int,
    device: torch.device | str,
) -> RaggedCache:
    """policies: by layer; max_tokens: slots that a page table can name at first."""
    pool = PagePool(
        pages,
        page_size=page_size,
        head_dim=shape.dim,
        dtype=shape.dtype,
        device=device,
        states=_all(policies, shape),
    )
    return RaggedCache(
        pool,
        [policy.window(layer) for layer, policy in enumerate(policies)],
        kv_heads=shape.kv_heads,
        rows=rows,
        max_tokens=max_tokens,
        rewrites=[policy.rewrites for policy in policies],
        states=[policy.state(shape) for policy in policies],
    )


def _all(policies: Sequence[Policy], shape: HeadShape) -> list[State]:
    return [state for policy in {id(p): p for p in policies}.values() for state in policy.state(shape)]
