"""lm-evaluation-harness through `local-completions`: what the server says is what the engine says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from http_serving import Running, serving, tiny_llm
from serving import assert_empty
from sparsekv import SamplingParams, SparseCache

PAIRS = [("the old ship", " sails slowly"), ("green light", " and"), ("a river under", " the mountain turns")]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(tiny_llm()) as running:
        yield running
        assert_empty(running.llm)


@pytest.fixture(scope="module")
def client(server: Running, tmp_path_factory: pytest.TempPathFactory) -> LocalCompletionsAPI:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    server.llm.tokenizer.save_pretrained(folder)
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="huggingface",
        model="tiny",
        tokenizer=str(folder),
        batch_size=2,
        max_length=512,
    )


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def test_likelihoods(server: Running, client: LocalCompletionsAPI) -> None:
    llm, encode = server.llm, server.llm.tokenizer.encode
    found = client.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, rest), (value, greedy) in zip(PAIRS, found, strict=True):
        before, ids = len(encode(context)), encode(context + rest)
        with torch.no_grad():
            logits = llm.model(torch.tensor([ids]), past_key_values=SparseCache(llm.model)).logits[0]
        scores = logits.log_softmax(-1)[before - 1 : -1]
        told = torch.tensor(ids[before:])
        assert value == pytest.approx(float(scores.gather(1, told[:, None]).sum()), abs=1e-6)
        assert greedy == bool((scores.argmax(-1) == told).all())


def test_generations(server: Running, client: LocalCompletionsAPI) -> None:
    contexts = [context for context, _ in PAIRS]
    gen = {"until": ["zzz"], "max_gen_toks": 10, "temperature": 0}
    found = client.generate_until(instances("generate_until", [(c, dict(gen)) for c in contexts]), disable_tqdm=True)
    expected = server.llm.generate(contexts, SamplingParams(max_tokens=10, temperature=0, stop=["zzz"]))
    assert found == [output.outputs[0].text for output in expected]
