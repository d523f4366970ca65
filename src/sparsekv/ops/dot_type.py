"""The type in which a Triton kernel multiplies tiles."""

import torch
import triton.language as tl

from sparsekv.ops.layout import interpreting


def dot_type(*kinds: torch.dtype) -> tl.dtype:
    """The widest of bfloat16, float16 and float32 kinds, as Triton names it."""
    wide = kinds[0]
    for kind in kinds[1:]:
        wide = torch.promote_types(wide, kind)
    if wide == torch.bfloat16 and interpreting():  # it has no bfloat16 dot
        wide = torch.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[wide]
