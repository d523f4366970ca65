"""FlexAttention with the gate, on a GPU, where it alone has the gate's gradient."""

import pytest
import torch

from gating import assert_right, scene
from sparsekv.ops.gate import flex


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [None, [[i // 300 for i in range(2048)]]])
def test_flex_at_real_sizes(documents):
    inputs = scene(2048, heads=2, group=4, dim=128, window=64, documents=documents, dtype=torch.bfloat16)
    assert_right(inputs, flex.gate)
