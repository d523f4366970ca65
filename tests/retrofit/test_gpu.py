"""On a GPU: training passes gradients through FlexAttention, and the mask's forward is the cache's."""

from collections.abc import Callable

import pytest
import torch

import sparsekv
import tiny
from helpers import tiny_model
from sparsekv.evals.corpus import Corpus
from sparsekv.evals.forward import read
from sparsekv.modeling.split import SplitModel
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data.documents import read_all
from sparsekv.retrofit.data.rows import blend
from sparsekv.retrofit.trainer import train

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
