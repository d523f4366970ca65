"""Calibration: the table is monotone, measured, and what a cache at that offset really holds."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparsekv
import tiny
from helpers import tiny_model, tokens
from sparsekv.evals.calibrate import calibrate, offset_for, recalibrate
from sparsekv.evals.corpus import Corpus, load_documents
from sparsekv.evals.settings import CalibrationConfig
from sparsekv.modeling.adapter import AdapterConfig, base_shape, read_adapter, save_adapter
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.load import load_model
from sparsekv.retrofit.config import RetrofitConfig

TARGETS = [1.25, 2.0, 3.0, 5.0, 8.0]


def attached(lag: int = 0):
    model = tiny_model(max_position_embeddings=512)
    sparsekv.attach(model, policy="dms", window=8, lag=lag)
    tiny.random_heads(sparsekv.heads(model))
    return model


def test_offset_for_is_exact_on_given_logits_by_hand() -> None:
    z = torch.tensor([[[3.0, -2.0, 1.0, 0.0, -1.0, 9.0, 9.0, 9.0]]])  # window 3: the first five can be forgotten
    offset = offset_for(z, 2.0, window=3)  # 4 held: 3 protected and the lowest of the five
    assert offset == pytest.approx(1.5)  # between -2 and -1
    assert int((z[..., :5] + offset > 0).sum()) == 4  # the rest of the five go: 8 seen, 4 held
    assert offset_for(z, 8 / 3, window=3) == pytest.approx(2.5)  # none of the five is held
    assert offset_for(z, 4.0, window=3) is None


@pytest.mark.parametrize(("eviction", "lag"), [("cache", 0), ("mask", 0), ("mask", 1)])
def test_the_table_is_monotone_and_near_its_targets(eviction: str, lag: int) -> None:
    model = attached(lag)
    told = []
    table = calibrate(model, tokens(3, 200), targets=TARGETS, batch=2, eviction=eviction, on_dial=told.append)
    assert [dial.ratio for dial in table] == pytest.approx(TARGETS, rel=0.05)
    assert [dial.offset for dial in table] == sorted(dial.offset for dial in table)
    assert told == table
    assert attachment_of(model).policy.offset == 0


def test_rows_longer_than_a_chunk_give_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(attached(), tokens(2, 200), targets=[2.0, 4.0])
    monkeypatch.setattr("sparsekv.evals.forward.CHUNK", 64)
    chunked = calibrate(attached(), tokens(2, 200), targets=[2.0, 4.0])
    for one, other in zip(whole, chunked, strict=True):
        assert one.ratio == pytest.approx(other.ratio, rel=1e-3)
        assert one.offset == pytest.approx(other.offset, abs=1e-3)


def test_the_measured_ratio_is_what_a_cache_holds_at_that_offset() -> None:
    model, ids = attached(), tokens(2, 200)
    for dial in calibrate(model, ids, targets=[2.0, 4.0], eviction="mask"):
        attachment_of(model).policy.offset = dial.offset
        cache = sparsekv.SparseCache(model)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert cache.stats().compression_ratio == pytest.approx(dial.ratio, rel=1e-3)


def test_targets_beyond_the_window_are_left_out_or_refused() -> None:
    model = attached()
    table = calibrate(model, tokens(1, 64), targets=[2.0, 8.5], eviction="mask")
    assert len(table) == 1
    with pytest.raises(ValueError, match=r"no ratio from 8\.5 on can be reached at 64 tokens"):
        calibrate(model, tokens(1, 64), targets=[8.5], eviction="mask")
    dense = tiny_model()
    sparsekv.attach(dense, policy="dense")
    with pytest.raises(ValueError, match="policy 'dense' has no offset to calibrate"):
        calibrate(dense, tokens(1, 64), targets=[2.0])


def test_recalibrate_writes_the_table(configure: Callable[..., RetrofitConfig], tmp_path: Path) -> None:
    config = configure()
    model, _ = load_model(config.model, device="cpu")
    sparsekv.attach(model, policy="dms", window=8)
    tiny.random_heads(sparsekv.heads(model))
    folder = tmp_path / "adapter"
    save_adapter(model, folder, AdapterConfig(base_model_name_or_path="m", base_shape=base_shape(model), window=8))
    fresh, tokenizer = load_model(config.model, device="cpu")
    settings = CalibrationConfig(targets=[2, 3], rows=2, length=128, lengths=[64, 256, 100_000])
    recalibrate(
        fresh, tokenizer, adapter=str(folder), text=config.data[0].names[0], settings=settings, say=lambda line: None
    )
    written = read_adapter(folder)[0]
    assert [ratio for _, ratio in written.offsets] == pytest.approx([2, 3], rel=0.05)
    assert written.calibration == {"text": config.data[0].names[0], "rows": 2, "length": 128, "eviction": "cache"}
    assert sorted(written.ratios) == ["256", "64"]
    for length, (_, high) in written.ratios.items():
        attachment_of(fresh).policy.offset = written.offset_for(high, tokens=int(length))
        rows = Corpus(load_documents(config.data[0].names)[1], tokenizer).rows(2 if length == "64" else 1, int(length))
        cache = sparsekv.SparseCache(fresh)
        with torch.no_grad():
            fresh(rows, past_key_values=cache)
        assert cache.stats().compression_ratio == pytest.approx(high, rel=1e-3)
    assert math.isinf(written.offset_for(1))
    with pytest.raises(ValueError, match="there is no adapter folder nowhere"):
        recalibrate(fresh, tokenizer, adapter="nowhere", text="t", settings=settings, say=lambda line: None)
