"""lm-evaluation-harness over any policy, offline: local tasks of all three kinds, and what each row says."""

import json

import pytest
import torch

import sparsekv
import tiny
from helpers import tiny_model
from sparsekv.evals import harness
from sparsekv.evals.methods.setting import Setting
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attachment_of
from sparsekv.policies import Policy

TASKS = {
    "generate_until": {
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "multiple_choice": {
        "doc_to_text": "{{question}}",
        "doc_to_choice": [" river", " mountain ship"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The three tasks as YAML files beside their JSON documents."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [{"question": tiny.text(60, seed=i), "answer": "river"} for i in range(3)]
    (folder / "documents.json").write_text(json.dumps(documents))
    data = {"dataset_path": "json", "test_split": "test"}
    data["dataset_kwargs"] = {"data_files": {"test": str(folder / "documents.json")}, "cache_dir": str(folder)}
    paths = {}
    for kind, task in TASKS.items():
        paths[kind] = str(folder / f"{kind}.yaml")
        (folder / f"{kind}.yaml").write_text(json.dumps({"task": f"my_{kind}", "output_type": kind} | data | task))
    return paths


@pytest.fixture
def model():
    built = tiny_model(vocab_size=512, max_position_embeddings=256)
    sparsekv.attach(built, policy="dense")
    return built


def measured(model, task, *settings):
    return harness.measure_tasks(model, tiny.tokenizer(), settings, tasks=[task], limit=None, batch=2, seed=0)


@pytest.mark.parametrize("kind", TASKS)
def test_a_local_task_gives_a_row_for_dense_and_each_setting(model, tasks, kind) -> None:
    tova = Setting(policy="tova", cr=4)
    dense, ours = measured(model, tasks[kind], tova)
    assert (dense.task, dense.policy, ours.policy) == (f"my_{kind}", "dense", "tova")
    assert ours.budget is not None and ours.tokens_held <= ours.budget + 1  # a prompt ends with the first step
    assert dense.ratio == 1 and ours.ratio > 2
    assert 0 < ours.bytes <= dense.bytes
    assert (ours.kv_reads or 0) > 0 and ours.output_tokens > 0
    for score in ours.scores.values():
        assert score.low is not None and score.high is not None
        assert score.low <= score.value <= score.high
    assert type(attachment_of(model).policy) is Policy


def test_an_ample_budget_scores_as_dense_does(model, tasks) -> None:
    for kind in ("multiple_choice", "loglikelihood_rolling", "generate_until"):
        dense, ours = measured(model, tasks[kind], Setting(policy="h2o", budget=256))
        for name, score in dense.scores.items():
            assert ours.scores[name].value == pytest.approx(score.value, rel=1e-4)


def test_scores_are_those_of_a_plain_forward(model) -> None:
    lm = harness.SparseLM(model, tokenizer=tiny.tokenizer(), policy="dense")
    ids = lm.tok_encode(tiny.text(30), add_special_tokens=False)
    (score, _), *_ = lm._loglikelihood_tokens([(("", ""), ids[:9], ids[9:])])
    with contexts.original(model), torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, 8:-1].log_softmax(-1)
    assert score == pytest.approx(float(logits.gather(-1, torch.tensor(ids[9:])[:, None]).sum()), rel=1e-4)


def test_the_model_is_registered_and_loads_by_name(folder) -> None:
    from lm_eval.api.registry import get_model

    lm = get_model("sparsekv").create_from_arg_string(f"pretrained={folder},policy=streaming,budget=64")
    assert lm.setting == Setting(policy="streaming", budget=64)


def test_an_unknown_task_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"cannot load the tasks nowhere\.yaml"):
        harness.load_tasks(["nowhere.yaml"])
