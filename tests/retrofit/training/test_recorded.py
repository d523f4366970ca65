"""A recorded step: whatever changes from step to step reaches the device in tensors that stay in place.

A stand-in for CUDA graphs on the CPU, a tape of operations, replays them on the tensors they had: what the host had
decided while it was recorded stays as it was, as in a graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retrofitting import Configure, trainer_of
from sparsekv.retrofit.training import recorded
from sparsekv.retrofit.training.recorded import WARM_UPS, Recorded

SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not str(func).startswith(SYNCS), f"{func} waits for the device"
        self.done.append((func, args, kwargs or {}, [x for x in tree_leaves(out) if isinstance(x, Tensor)]))
        return out

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            self._replay()

    def _replay(self) -> None:
        for func, args, kwargs, outs in self.done:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(outs, again, strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor written in place
                    old.copy_(new)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def record(graph: Tape, **_: Any) -> Iterator[None]:
        with graph:
            yield

    for name, stand_in in {
        "CUDAGraph": Tape,
        "graph": record,
        "Stream": MagicMock,
        "current_stream": MagicMock,
        "stream": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(recorded.torch.cuda, name, stand_in)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)  # as it is while a graph is recorded


def test_a_replay_is_a_call(tape: None) -> None:
    """For each shape of inputs, the host's number as it was when it was recorded."""
    weight, factor = nn.Parameter(torch.ones(3)), torch.tensor(1.0)
    calls = []

    def work(x: Tensor) -> dict[str, Tensor]:
        calls.append(len(x))
        loss = (factor * weight * x).sum()
        loss.backward()
        return {"loss": loss.detach()}

    run = Recorded(work, [weight])
    for shape in ((3,), (2, 3)):
        for i in range(1, WARM_UPS + 4):
            weight.grad, x = None, i * torch.ones(shape)
            factor.fill_(10 * i)
            assert run(x=x)["loss"] == (10 * i * x).sum()
            assert torch.equal(weight.grad, (10 * i * x).expand(shape).reshape(-1, 3).sum(0))
    assert len(calls) == 2 * (WARM_UPS + 1)
    with pytest.raises(AssertionError, match="left"):
        run(x=x)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hold_steps": 8, "hold": "random", "fraction": "hard"},
        {"trainable": "lora", "pull": "bernoulli_kl", "granularity": "layer"},
        {"trainable": "all", "base_lr": 0.01, "pull": "hinge_sum"},
    ],
    ids=["heads", "random ratios", "lora", "all"],
)
def test_a_recorded_run_gives_the_losses_of_a_plain_one(
    configure: Configure, tape: None, settings: dict[str, Any], tmp_path: Any
) -> None:
    def losses(name: str, prepare: Callable[[Any], None]) -> list[list[float]]:
        config = configure(lr=0.05, save_every=100, output=str(tmp_path / name), **settings)
        found = []
        with trainer_of(config) as trainer:
            prepare(trainer)
            record = trainer.metrics.record
            trainer.metrics.record = lambda line: (found.append([line["divergence"], line["hinge"]]), record(line))
            trainer.train()
        return found

    def recording(trainer: Any) -> None:
        trainer.recorded = Recorded(
            trainer._forward_backward, [p for p in trainer.model.parameters() if p.requires_grad]
        )

    plain = losses("plain", lambda trainer: None)
    assert len(plain) > WARM_UPS + 2
    torch.testing.assert_close(losses("recorded", recording), plain, rtol=1e-4, atol=1e-6)
