"""Metrics and logs: right, and without a word of what was said."""

import io
import json
import logging
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from http_serving import Running, serving, tiny_llm
from sparsekv.server.operate.logs import JSONFormatter

SECRET = "harbour-9731"
STEMS = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
    *("time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count"),
    *("logical_tokens", "held_tokens", "compression_ratio", "kv_pages_free", "swapped_sequences", "dial_offset"),
)


def metrics(running: Running) -> dict[str, float]:
    """By name, summed over labels."""
    with urllib.request.urlopen(running.url + "/metrics", timeout=30) as reply:
        text = reply.read().decode()
    assert SECRET not in text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("sparsekv:")
            found[name] = found.get(name, 0.0) + sample.value
    return found


def ask(running: Running, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "tiny", "prompt": SECRET, "max_tokens": 30, "temperature": 0}
    return running.client().completions.create(**given | {"extra_body": {"ignore_eos": True}} | options)


def test_what_is_counted() -> None:
    with serving(tiny_llm()) as server:
        before = metrics(server)
        assert set(STEMS) - {"request_success_total"} <= set(before)
        usage = ask(server, n=3, temperature=1.0, seed=1).usage
        after = metrics(server)
        assert after["prompt_tokens_total"] == usage.prompt_tokens
        assert after["generation_tokens_total"] == usage.completion_tokens == 90
        assert after["time_to_first_token_seconds_count"] == after["e2e_request_latency_seconds_count"] == 1
        assert after["inter_token_latency_seconds_count"] >= 1
        assert after["request_success_total"] == 3
        assert after["kv_pages_free"] == after["kv_pages"]
        stream = ask(server, n=4, temperature=1.0, max_tokens=1500, stream=True)
        for _, _chunk in zip(range(200), stream, strict=False):
            pass
        during = metrics(server)
        stream.close()
        assert during["num_requests_running"] == 4
        assert during["held_tokens"] > 0
        assert during["compression_ratio"] == pytest.approx(during["logical_tokens"] / during["held_tokens"])
        assert 0 < during["kv_cache_usage_perc"] < 1


def test_waiting_and_swapped_samples_show() -> None:
    llm = tiny_llm(max_num_seqs=4, pages=160)
    with serving(llm) as server:
        stream = ask(server, n=6, temperature=1.0, max_tokens=100, stream=True)
        next(stream)
        found = metrics(server)
        assert found["num_requests_running"] + found["num_requests_waiting"] == 6
        for _ in stream:
            pass
        found = metrics(server)
        assert found["num_preemptions_total"] > 0
        assert found["num_requests_running"] == found["num_requests_waiting"] == found["swapped_sequences"] == 0


@pytest.mark.parametrize("told", [False, True])
def test_a_line_for_each_request(told: bool) -> None:
    logger, stream = logging.getLogger("sparsekv"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with serving(tiny_llm(), log_prompts=told) as server:
            ask(server, n=2, temperature=1.0)
            with pytest.raises(Exception, match="400"):
                ask(server, temperature=-1)
            urllib.request.urlopen(server.url + "/health", timeout=30).close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    first, second = (line for line in lines if line["message"] == "request")
    assert (first["path"], first["status"], first["n"]) == ("/v1/completions", 200, 2)
    assert first["completion_tokens"] == 60
    assert first["finish_reasons"] == ["length", "length"]
    assert first["seconds"] > 0
    assert second["status"] == 400
    assert (SECRET in stream.getvalue()) == told
    if told:
        assert first["prompts"] == [SECRET]
        assert len(first["texts"]) == 2
