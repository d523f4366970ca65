"""eval: one command for every policy, a dense row beside it, and each row with what was held and read."""

import json
import shutil

import pytest

import sparsekv
from helpers import random_heads, tiny_model
from sparsekv.dms import NeuronSource
from sparsekv.modeling.adapter import AdapterConfig, base_shape, save_adapter
from sparsekv.modeling.load import load_model
from sparsekv.policies.registry import describe, policy_names

SMALL = ("--length", 96, "--rows", 2, "--contexts", 256, "--items", 3, "--batch", 3)
UNTRAINED = [name for name in policy_names() if not describe(name).needs_training and name != "dense"]


@pytest.fixture(scope="session")
def adapter_for(folder, tmp_path_factory):
    """Random parameters for the tiny model, at whose largest offset nearly everything is forgotten, or merged."""

    def write(policy):
        model, _ = load_model(str(folder))
        options = {"neuron": NeuronSource(scale=2.0, offset=0.0)} if policy == "dmc" else {"window": 4}
        sparsekv.attach(model, policy="dmc" if policy == "dmc" else "dms", **options)
        if policy != "dmc":
            random_heads(model)
        config = AdapterConfig(
            base_model_name_or_path="tiny",
            base_shape=base_shape(model),
            window=4,
            offsets=[(-2.0, 1.2), (3.0, 8.0)],
            **({"policy": "dmc", "source": "neuron", "lag": 1, **options} if policy == "dmc" else {}),
        )
        out = tmp_path_factory.mktemp("eval") / "adapter"
        save_adapter(model, out, config)
        return out

    return write


@pytest.fixture(scope="session")
def deep(folder, tmp_path_factory):
    """Of three layers, since Quest reads the first two densely."""
    out = shutil.copytree(folder, tmp_path_factory.mktemp("deep") / "model")
    tiny_model(vocab_size=512, max_position_embeddings=2048, num_hidden_layers=3).save_pretrained(out)
    return out


@pytest.fixture
def evaluate(run, folder):
    def call(*words, model=folder):
        outcome = run("eval", model, "--text", folder / "texts", *words, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return call


def rows_of(record, policy):
    return {row["task"]: row for row in record["rows"] if row["policy"] == policy}


@pytest.mark.parametrize("policy", UNTRAINED)
def test_every_untrained_policy_is_measured_at_its_budget(evaluate, deep, policy) -> None:
    small = SMALL if policy != "snapkv" else ("--length", 160, *SMALL[2:])
    record = evaluate("--policy", policy, "--cr", 4, "--tasks", "perplexity,passkey", *small, model=deep)
    dense, ours = rows_of(record, "dense"), rows_of(record, policy)
    assert set(dense) == set(ours) == {"perplexity", "pass key"}
    for task, row in ours.items():
        assert row["budget"] == row["length"] // 4
        assert row["length"] - 3 <= row["tokens_seen"] < row["length"]
        assert (row["cr"], row["seed"], row["adapter"]) == (4, 0, None)
        assert row["ratio"] == pytest.approx(row["tokens_seen"] / row["tokens_held"])
        assert dense[task]["ratio"] == 1
        assert 0 < row["bytes"] <= dense[task]["bytes"] * (1.3 if policy in ("quest", "h2o", "random") else 1)
        assert (row["ratio"] > 1.2) is describe(policy).frees_memory
        assert row["kv_reads"] is None or row["kv_reads"] < dense[task]["kv_reads"]
        for score in row["scores"].values():
            assert score["low"] <= score["value"] <= score["high"]
    assert ours["perplexity"]["scores"]["divergence"]["value"] > 1e-4  # the policy acted on what was scored
    assert dense["perplexity"]["scores"]["divergence"]["value"] == 0
    assert record["commit"] is not None and record["settings"]["length"] == small[1]


@pytest.mark.parametrize("policy", [name for name in policy_names() if describe(name).needs_training])
def test_every_trained_policy_is_measured_with_an_adapter(evaluate, adapter_for, policy) -> None:
    budget = ("--budget", 64) if describe(policy).budget else ()
    words = ("--policy", policy, "--adapter", adapter_for(policy), "--cr", 2, "--cr", 4, *budget)
    record = evaluate(*words, "--tasks", "perplexity", *SMALL)
    rows = [row for row in record["rows"] if row["policy"] == policy]
    assert [row["cr"] for row in rows] == [2, 4]
    assert 1 < rows[0]["ratio"] < rows[1]["ratio"]


def test_retrieval_tasks_have_depths_and_both_kinds_of_answers(evaluate) -> None:
    tasks = "unseen,look-up,multi-needle,variable-tracking"
    words = ("--policy", "streaming", "--budget", 64, "--tasks", tasks, "--contexts", 512, "--items", 1)
    for answers in ("forced", "generated"):
        record = evaluate(*words, "--answers", answers)
        assert len(record["rows"]) == 8
        for row in record["rows"]:
            assert set(row["by_depth"]) == {"first quarter", "second quarter", "third quarter", "last quarter"}
            assert row["output_tokens"] > 0 and row["kv_reads"] > 0


def test_other_texts_and_lengths_are_rows_of_their_own(evaluate, folder) -> None:
    words = ("--tasks", "perplexity", "--long-lengths", "192", "--other-texts", folder / "texts" / "0.txt", *SMALL)
    record = evaluate(*words)
    assert [(row["text"], row["length"]) for row in record["rows"]] == [
        ("held out", 96),
        (str(folder / "texts" / "0.txt"), 96),
        ("held out", 192),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "nope"], "unknown policy 'nope'"),
        (["--policy", "tova"], "pass --budget N or --cr R"),
        (["--policy", "tova", "--budget", 0], "budget is 0"),
        (["--policy", "tova", "--budget", 9999], "context is 2048"),
        (["--policy", "snapkv", "--budget", 32], "at least 33"),
        (["--policy", "snapkv", "--cr", 16], "at least 33"),
        (["--policy", "tova", "--cr", 4, "--budget", 64], "pass one of them"),
        (["--policy", "tova", "--cr", 0.5], "use 1 or more"),
        (["--policy", "tova", "--cr", 4, "--option", "sinks=4"], "does not take sinks; it takes budget, cr"),
        (["--policy", "streaming", "--cr", 4, "--option", "sinks"], "has no '='"),
        (["--policy", "dense", "--cr", 4], "has no budget that --cr could set"),
        (["--policy", "dms"], "needs trained eviction heads: pass --adapter"),
        (["--policy", "dms-quest", "--budget", 64], "needs trained eviction heads: pass --adapter"),
        (["--policy", "tova", "--cr", 4, "--adapter", "x"], "uses no adapter"),
        (["--cr", 4], "--cr needs a method"),
        (["--policy", "tova", "--cr", 4, "--by", "prefill"], "use --by steps"),
        (["--tasks", ""], "--tasks is empty"),
        (["--contexts", "5"], "contexts has 5 tokens"),
        (["--length", 4096], "the longest document has"),
    ],
)
def test_bad_options_are_one_sentence(run, folder, words, message) -> None:
    outcome = run("eval", folder, "--text", folder / "texts", "--length", 96, "--contexts", 256, *words, "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Error: ") and len(outcome.err.strip().splitlines()) == 1
    assert message in outcome.err


def test_the_harness_s_tasks_run_beside_ours(evaluate, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip for seconds
    documents = [{"question": "The river turns slowly and the ship sails", "answer": 0}] * 2
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    task = {
        "task": "mine",
        "output_type": "multiple_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.json")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": [" river", " mountain"],
        "doc_to_target": "answer",
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    tasks = f"passkey,{tmp_path / 'mine.yaml'}"
    record = evaluate("--policy", "tova", "--cr", 2, "--tasks", tasks, "--contexts", 256, "--items", 1)
    assert [(row["task"], row["policy"]) for row in record["rows"]] == [
        ("pass key", "dense"),
        ("pass key", "tova"),
        ("mine", "dense"),
        ("mine", "tova"),
    ]


@pytest.mark.slow
def test_the_embedded_model_is_measured(run) -> None:
    words = ("eval", "smollm2-135m", "--policy", "tova", "--cr", 4, "--tasks", "passkey,perplexity")
    outcome = run(*words, "--rows", 1, "--length", 64, "--contexts", 256, "--items", 1, "--json")
    assert outcome.code == 0, outcome.err
    dense, ours = (rows_of(json.loads(outcome.out), name) for name in ("dense", "tova"))
    assert dense["pass key"]["scores"]["accuracy"]["value"] == 1
    assert dense["perplexity"]["scores"]["perplexity"]["value"] < 60
    assert ours["perplexity"]["ratio"] > 3.5
