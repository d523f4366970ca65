"""linear's kernel against float64: any shape, any cut, and a workspace left as it was found."""

import pytest
import torch

from sparsekv.ops.linear import linear, workspace_for
from sparsekv.ops.linear.triton import TICKETS, LinearConfig

CUTS = [
    LinearConfig(outputs=16, inputs=32, programs=2),
    LinearConfig(outputs=16, inputs=32, programs=10),
    LinearConfig(outputs=32, inputs=16, programs=6),
]
"""Of the interpreter's one processor: whole tiles, tiles in pieces, and programs with several of both."""


def _errors(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> tuple[float, float]:
    """The largest error against float64: ours, and that of PyTorch's own product in the same type."""
    exact = x.double() @ weight.double().T
    eager = torch.nn.functional.linear(x, weight)
    return (out.double() - exact).abs().max().item(), (eager.double() - exact).abs().max().item()


@pytest.mark.parametrize("config", CUTS, ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 64, 128), (3, 70, 200), (8, 16, 512), (20, 48, 33)])
def test_any_shape_and_cut(config: LinearConfig, tokens: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(tokens)
    x, weight = (torch.randn(n, inputs, dtype=torch.float16) for n in (tokens, outputs))
    workspace = workspace_for(x.device)
    for _ in range(2):  # the second finds the first one's pieces
        ours, eager = _errors(x, weight, linear(x, weight, workspace=workspace, backend="triton", config=config))
        assert ours <= 2 * eager + 1e-3
        assert not workspace[:TICKETS].any()


def test_what_it_refuses() -> None:
    x, weight = torch.randn(4, 32, dtype=torch.float16), torch.randn(16, 32, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"expected \[T, K\] and \[N, K\]"):
        linear(x, weight[:, :16])
    with pytest.raises(ValueError, match="takes 1 to 32 tokens, not 40"):
        linear(x.repeat(10, 1), weight, backend="triton")
    with pytest.raises(ValueError, match="bfloat16"):
        linear(x.float(), weight.float(), backend="triton")
    with pytest.raises(ValueError, match="contiguous"):
        linear(x, weight.T.contiguous().T, backend="triton")
    assert torch.equal(linear(x.float(), weight.float()), torch.nn.functional.linear(x.float(), weight.float()))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 16, 32])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(6144, 4096), (4096, 12288), (24576, 4096), (1000, 1111), (128256, 2048)]
)
def test_on_a_gpu(tokens: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, inputs, dtype=torch.bfloat16, device="cuda") for n in (tokens, outputs))
    workspace = workspace_for(x.device)
    first = linear(x, weight, workspace=workspace, backend="triton")
    ours, eager = _errors(x, weight, first)
    assert ours <= 1.5 * eager
    for _ in range(20):  # one after the other, each there before the last has ended: the same bits every time
        assert torch.equal(linear(x, weight, workspace=workspace, backend="triton"), first)
    assert not workspace[:TICKETS].any()
