"""peer: vLLM is asked for the same requests, and a line that says less than was asked is an error. vLLM itself is
played here by a class that answers at once."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from bench.test_serve import TINY
from sparsekv.bench import peer


class Engine:
    """vLLM's LLM, as far as it is used."""

    asked: ClassVar[list[Any]] = []
    short = 0

    def __init__(self, **options: Any) -> None:
        self.asked.append(options)

    def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        self.asked.append((prompts, params))
        answer = [SimpleNamespace(token_ids=[0] * (p.max_tokens - self.short)) for p in params]
        return [SimpleNamespace(outputs=[a] * p.n) for a, p in zip(answer, params, strict=True)]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    engine = type("LLM", (Engine,), {"asked": []})
    module = SimpleNamespace(LLM=engine, SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return engine


def test_the_same_requests_with_one_engine(vllm: type[Engine]) -> None:
    works = [TINY, replace(TINY, name="two", samples=2, sampling="top-p")]
    start, tiny, two = peer.bench_peer(works, device=torch.device("cpu"))
    assert [start["work"], tiny["work"], two["work"]] == ["start", "tiny", "two"]
    assert {line["engine"] for line in (start, tiny, two)} == {"vLLM 0"}
    options, *_, (prompts, params) = vllm.asked
    assert options["kv_cache_memory_bytes"] == TINY.memory
    assert len(prompts) == TINY.requests
    assert {len(prompt["prompt_token_ids"]) for prompt in prompts} == {TINY.prompt}
    assert all(TINY.output[0] <= p.max_tokens <= TINY.output[1] and p.top_p == 0.95 and p.n == 2 for p in params)


def test_missing_tokens_are_an_error(vllm: type[Engine]) -> None:
    vllm.short = 1
    with pytest.raises(RuntimeError, match=r"tiny: .* tokens came of"):
        list(peer.bench_peer([TINY], device=torch.device("cpu")))


def test_arrivals_are_not_asked_for() -> None:
    assert "arrivals-8" not in {work.name for work in peer.peers_of([])}
    with pytest.raises(ValueError, match="no such work for vLLM: arrivals-8; use some of short-greedy"):
        peer.peers_of(["arrivals-8"])
