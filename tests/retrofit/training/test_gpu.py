"""On a GPU: training passes gradients through FlexAttention, and the mask's forward is the cache's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparsekv
import tiny
from helpers import tiny_model
from retrofitting import Configure, trained
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.forward import read
from sparsekv.modeling.split import SplitModel
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data.documents import read_all
from sparsekv.retrofit.data.rows import blend
from sparsekv.retrofit.training import recorded
from sparsekv.retrofit.training.trainer import train

pytestmark = pytest.mark.gpu


def test_training_and_the_hard_rule_on_cuda(configure: Callable[..., RetrofitConfig], tmp_path) -> None:
    config = configure(device="cuda", max_steps=3, output=str(tmp_path))
    model = tiny_model(vocab_size=512, max_position_embeddings=2048, head_dim=16, dtype=torch.bfloat16).cuda()
    sparsekv.attach(model, policy="dms", window=config.window)
    tokenizer = tiny.tokenizer()
    corpus = Corpus([tiny.text(1500)], tokenizer)
    rows = blend(read_all(config.data, tokenizer, model="", seed=0), tokenizer, count=6, length=512, seed=0)
    train(model, rows, config, progress=False)
    heads = sparsekv.heads(model)
    assert all(head.weight.any() and torch.isfinite(head.weight).all() for head in heads)
    tiny.random_heads([head.cpu() for head in heads])
    model.float().cuda()
    ids = corpus.rows(2, 256).cuda()
    masked, cached = (read(SplitModel(model), ids, eviction=eviction) for eviction in ("mask", "cache"))
    assert masked.held == pytest.approx(cached.held, rel=1e-3)
    assert torch.allclose(masked.hidden, cached.hidden, atol=2e-2)


@pytest.mark.parametrize("trainable", ["heads", "lora", "all"])
def test_a_recorded_run_gives_the_losses_of_a_plain_one(
    configure: Configure, trainable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph from the fourth step on, at random ratios."""

    def losses(name: str) -> list[float]:
        held = {"hold_steps": 8, "hold": "random"}
        made = trained(configure(device="cuda", trainable=trainable, output=str(tmp_path / name), **held))[1]
        return [line["loss"] for line in made]

    with monkeypatch.context() as patch:
        patch.setattr(recorded, "WARM_UPS", 1000)
        plain = losses("plain")
    assert len(plain) > recorded.WARM_UPS + 4
    assert losses("recorded") == pytest.approx(plain, rel=1e-2, abs=1e-4)
