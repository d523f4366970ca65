"""draw's kernel against the reference: the same tokens for the same numbers, ties and edges included."""

import pytest
import torch
import triton
from torch import Tensor

from sparsekv.ops.draw import draw, reference
from sparsekv.ops.draw import triton as kernel

pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter; the noise is meant to wrap around
VOCAB, CUT = 300, 128
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
OFF = (0.0, 0, 1.0)
FILTERS = [
    OFF,
    (0.0, 0, 0.9),
    (0.0, 0, 0.05),
    (0.0, 7, 1.0),
    (0.0, 1, 1.0),
    (0.2, 0, 1.0),
    (1.0, 0, 1.0),
    (0.0, 20, 0.95),
    (0.01, 40, 0.7),
    (0.0, 10**6, 0.999),
]


def _noise(rows: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """As many samples of one request, at one position."""
    return tuple(x.to(device) for x in (torch.full((rows,), 7), torch.arange(rows), torch.full((rows,), 3)))  # type: ignore[return-value]


def _filters(rows: int, one: tuple[float, int, float], device: str) -> tuple[Tensor, Tensor, Tensor]:
    min_p, top_k, top_p = one
    return (
        torch.full((rows,), min_p, device=device),
        torch.full((rows,), top_k, dtype=torch.int64, device=device),
        torch.full((rows,), top_p, device=device),
    )


def _both(logits: Tensor, one: tuple[float, int, float], heat: float) -> tuple[Tensor, Tensor]:
    rows, device = len(logits), str(logits.device)
    noise, temperature = _noise(rows, device), torch.full((rows,), heat, device=device)
    filters = _filters(rows, one, device)
    block = CUT if logits.shape[1] == VOCAB else kernel.BLOCK
    ours = kernel.draw(logits, noise, temperature, filters, block=block)
    return ours, reference.draw(logits, noise, temperature, filters)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", FILTERS, ids=str)
def test_the_reference_s_tokens(one: tuple[float, int, float], dtype: torch.dtype, device: str) -> None:
    """Of 16 bits many are tied: the first of them are kept. Rounding may move a sample at an edge."""
    logits = (torch.randn(4 if device == "cpu" else 200, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).to(
        device, dtype
    )
    logits[0, 5:40] = -torch.inf
    ours, theirs = _both(logits, one, 0.7)
    assert (ours != theirs).sum() <= len(logits) // 50


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_of_equal_logits_the_first_are_kept(device: str) -> None:
    """The reference keeps the same; each bound is that of the last token kept."""
    logits = torch.zeros(8 if device == "cpu" else 400, VOCAB, device=device, dtype=torch.bfloat16)
    logits[:, ::3] = 1.0  # 100 of them; the mass of each is 1 / (100 + 200 / e) of the whole
    each = 1 / (100 + 200 / torch.e)
    for one, last in (((0.0, 10, 1.0), 27), ((0.0, 0, 20.5 * each), 60), ((0.0, 50, 0.499), 72)):
        ours, theirs = _both(logits, one, 1.0)
        assert torch.equal(ours, theirs)
        assert ours.max() <= last
        assert not (ours % 3).any()
    ours, theirs = _both(logits, (0.0, 110, 1.0), 1.0)  # ten of the lower ones: 1, 2, 4, 5, ... 14
    assert set(ours[ours % 3 > 0].tolist()) <= {1, 2, 4, 5, 7, 8, 10, 11, 13, 14}
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_samples_follow_the_distribution(device: str) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf, 0.5], device=device)
    rows = 20_000 if device == "cuda" else 200
    ours, theirs = _both(logits.expand(rows, -1).contiguous(), OFF, 0.7)
    assert torch.equal(ours, theirs)
    share = torch.bincount(ours, minlength=6) / rows
    assert torch.allclose(share, (logits / 0.7).softmax(-1), atol=4 * (0.25 / rows) ** 0.5)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_temperatures_at_the_ends(device: str) -> None:
    """0 is greedy in the company of others, and next to 0 is as good as that; minus zero is zero."""
    logits = torch.randn(6, VOCAB, device=device)
    logits[5], logits[5, 9] = -torch.inf, -0.0
    logits[5, 11] = 0.0
    noise = _noise(6, device)
    temperature = torch.tensor([0.0, 1e-30, 1e-38, 1e30, 0.0, 1.0], device=device)
    for filters in (None, _filters(6, (0.0, 0, 0.5), device), _filters(6, (0.0, 2, 1.0), device)):
        ours = kernel.draw(logits, noise, temperature, filters, block=CUT)
        theirs = reference.draw(logits, noise, temperature, filters)
        assert ours[[0, 1, 2, 4]].tolist() == logits.argmax(-1)[[0, 1, 2, 4]].tolist()
        assert torch.equal(ours, theirs)
        assert int(ours[5]) in (9, 11)


def test_the_numbers_are_those_of_noise() -> None:
    """With equal logits the token is u * vocab."""
    from sparsekv.ops.noise import uniform

    rows = 64
    noise = (torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.arange(rows), torch.arange(rows) * 1000)
    ours = kernel.draw(torch.zeros(rows, 256), noise, torch.ones(rows), None, block=CUT)
    assert torch.equal(ours, (uniform(*noise) * 256).long())


def test_what_it_refuses() -> None:
    logits, noise = torch.randn(4, 9), _noise(4, "cpu")
    with pytest.raises(ValueError, match=r"expected \[S, vocab\]"):
        draw(logits, noise, temperature=torch.ones(3))
    with pytest.raises(ValueError, match="at most 32 bits"):
        draw(logits.double(), noise, temperature=torch.ones(4), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("one", FILTERS, ids=str)
def test_a_whole_vocabulary_on_a_gpu(one: tuple[float, int, float], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (torch.randn(64, 151936, generator=generator, device="cuda") * 2.5).to(dtype)
    ours, theirs = _both(logits, one, 0.6)
    assert (ours != theirs).sum() <= 2
    assert torch.equal(ours, _both(logits, one, 0.6)[0])


@pytest.mark.gpu
def test_one_row_needs_no_compilation_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row the parameters are views into their batch, wherever they lie."""
    missed: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **about: missed.append(about["repr"]))
    for rows in (2, 1):
        missed.clear()
        integers = torch.ones(rows, 4, dtype=torch.int64, device="cuda").unbind(-1)
        floats = torch.full((rows, 3), 0.5, device="cuda").unbind(-1)
        kernel.draw(
            torch.randn(rows, VOCAB, device="cuda"),
            integers[:3],
            floats[0],
            (floats[1], integers[3], floats[2]),
            block=CUT,
        )
    assert missed == []
