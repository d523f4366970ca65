"""bench: both sides run the same weights, and what is compared is held at the ratio asked."""

import json

import pytest
import torch

import sparsekv
from helpers import tiny_model, tokens
from sparsekv.bench import plain as bench_plain
from sparsekv.bench.fill import spread_lengths
from sparsekv.bench.plain import WINDOW, RandomMarks, pair
from sparsekv.modeling.cache import SparseCache

WINDOWED = {"prefill": ["--window", 16]}


def test_random_marks_hold_the_ratio_and_heads_differ():
    model = tiny_model("Llama", max_position_embeddings=2048, num_hidden_layers=8)
    sparsekv.attach(model, policy=RandomMarks(layers=8, kv_heads=2, tokens=1000, ratio=4))
    cache = SparseCache(model)
    model(tokens(1, 1000), past_key_values=cache)
    stats = cache.stats()
    assert stats.compression_ratio == pytest.approx(4, rel=0.25)
    flat = [held for layer in stats.held for held in layer]
    assert max(flat) > 2 * min(flat) > 2 * WINDOW


@pytest.mark.parametrize("ratio", [0.5, 20])
def test_ratios_that_the_window_excludes(ratio):
    with pytest.raises(ValueError, match="window of 64 allow 1 to 15"):
        RandomMarks(layers=1, kv_heads=1, tokens=1000, ratio=ratio)


def test_the_two_models_share_weights_and_only_one_is_attached():
    model = tiny_model("Llama")
    plain, ours = pair(model, ratio=1.5, adapter=None, tokens=200, seed=0)
    theirs = dict(plain.named_parameters())
    assert all(theirs[name] is parameter for name, parameter in ours.named_parameters())
    assert ours is model
    ids = tokens(1, 30)
    with pytest.raises(ValueError, match="not attached"):
        sparsekv.detach(plain)
    torch.testing.assert_close(plain(ids).logits, ours(ids).logits)  # nothing has left the window yet


@pytest.mark.parametrize("which", [["decode", "--context", 200, "--steps", 3], ["prefill", "--tokens", 200]])
def test_json_has_both_sides(run, model_folder, which):
    outcome = run("bench", *which, "--model", model_folder, "--cr", 2, "--json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert record["bench"] == which[0]
    assert record["speedup"] == pytest.approx(record["dense_ms"] / record["sparsekv_ms"])
    assert record["marks"] == "random-marks"
    assert record["hardware"]
    if which[0] == "decode":
        assert record["kv_bytes"] < record["dense_kv_bytes"]


@pytest.mark.parametrize("which", [["decode", "--context", 100, "--steps", 2], ["prefill", "--tokens", 100]])
def test_an_adapter_reads_text(run, model_folder, adapter_folder, monkeypatch, which):
    documents = [f"word{i} " * 300 for i in range(4)]
    monkeypatch.setattr("sparsekv.evals.corpus.fetch_text", lambda name: documents)
    read, texts = getattr(bench_plain, f"bench_plain_{which[0]}"), []

    def spy(model, ids, **options):
        texts.append(ids)
        return read(model, ids, **options)

    monkeypatch.setattr(bench_plain, read.__name__, spy)
    outcome = run("bench", *which, "--model", model_folder, "--adapter", adapter_folder, "--cr", 2)
    assert outcome.code == 0
    assert "times as fast" in outcome.out
    assert texts[0].shape == (1, 103 if which[0] == "decode" else 100)
    assert len(texts[0].unique()) < 20  # of the held-out document, which says one word


def test_a_context_that_the_model_does_not_have(run, model_folder):
    outcome = run("bench", "decode", "--model", model_folder, "--context", 250, "--steps", 40)
    assert outcome.code == 2
    assert "context is 256" in outcome.err


@pytest.mark.parametrize("which", [["decode", "--context", 256, "--batch", 2], ["prefill", "--tokens", 128]])
def test_a_shape_times_the_kernel_alone(run, which):
    outcome = run("bench", *which, "--shape", "tiny", "--cr", 2, "--threads", 1, "--json", *WINDOWED.get(which[0], []))
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert (record["bench"], record["shape"], record["ratio"]) == (which[0], "tiny", 2)
    if which[0] == "decode":
        assert record["of_copy"] == pytest.approx(record["bytes"] / record["us"] * 1e6 / record["copy_bytes_per_s"])
        assert record["bytes"] == pytest.approx(
            2 * 2 * 2 * 128 * 64 * 4, rel=0.01
        )  # k, v; rows; heads; live; dim; fp32
    else:
        assert record["speedup"] == pytest.approx(record["sdpa_ms"] / record["ms"])
        assert record["window"] == 16


def test_lengths_at_ratio_one_are_the_context():
    generator = torch.Generator().manual_seed(0)
    assert spread_lengths(7, 100.0, 100, generator, least=16).tolist() == [100] * 7
    spread = spread_lengths(1000, 50.0, 100, generator)
    assert spread.float().mean() == pytest.approx(50, rel=0.02)
    assert spread.min() < 25 < 75 < spread.max() <= 100


@pytest.mark.parametrize(
    "words",
    [
        ["step"],
        ["step", "--shape", "tiny", "--cr", 1],
        ["serve", "--rows", "short-greedy,churn-8"],
        ["suite", "x.jsonl"],
    ],
)
def test_without_a_gpu_one_sentence(run, words, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    outcome = run("bench", *words)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: this benchmark replays CUDA graphs")
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["decode", "--shape", "huge"], "unknown shape 'huge'; use one of qwen3-8b"),
        (["prefill", "--shape", "huge"], "unknown shape 'huge'"),
        (["step", "--shape", "huge"], "unknown shape 'huge'"),
        (["serve", "--rows", "short-greedy,much"], "unknown row 'much'; use some of short-greedy"),
        (["step", "--context", 256, "--cr", 8], "256 tokens with a window of 64 allow 1 to 4"),
        (["decode", "--shape", "tiny", "--cr", 0.5], "the ratio is 0.5"),
        (["decode", "--shape", "tiny", "--adapter", "x"], "exclude each other"),
        (["decode", "--batch", 2], "--batch needs --shape"),
        (["prefill", "--window", 16], "--window needs --shape"),
    ],
)
def test_mistakes_with_shapes(run, words, sentence):
    outcome = run("bench", *words)
    assert outcome.code == 2
    assert sentence in outcome.err


def test_train_on_a_cpu_works_and_says_that_it_measures_no_target(run):
    words = ["--shape", "tiny", "--tokens", 140, "--batch", 2]
    outcome = run("bench", "train", *words, "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert "measures no target" in record["note"]
    assert list(record["attention"]["backends"]) == ["reference"]
    assert record["step"]["extrapolated_from_layers"] is None
    assert record["step"]["of_matmul"] == pytest.approx(record["step"]["tflops"] / record["matmul_tflops"])
    assert "a CPU run" in run("bench", "train", *words).out


def test_train_at_its_own_shapes_needs_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run("bench", "train")
    assert outcome.code == 2
    assert "use --shape tiny" in outcome.err


def test_the_host_alone(run, monkeypatch):
    """Without a GPU."""
    monkeypatch.setattr("sparsekv.bench.host.TEXTS", {"none": {"detokenize": False}, "stop": {"stop": ["never said"]}})
    outcome = run("bench", "host", "--shape", "tiny", "--steps", 20, "--json")
    assert outcome.code == 0, outcome.err
    records = [json.loads(line) for line in outcome.out.splitlines()]
    *records, last = records
    assert (last["sequences"], last["ending"]) == (2048, 500) and last["ended"] > 0
    found = {(r["sequences"], r["output"], r["text"]): r["ms"] for r in records}
    assert set(found) == {(n, output, text) for n in (64, 256) for output in (0, 8192) for text in ("none", "stop")}
    assert min(found.values()) > 0
