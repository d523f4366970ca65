"""The ratio while the server runs: turned by hand within bounds, or by the pool's pressure; each change is counted."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import save_model, write_adapter
from http_serving import Running, serving, wait_for
from serving import assert_empty
from sparsekv import LLM
from sparsekv.modeling.load import load_model
from sparsekv.server.operate.dial import Dial, bounds


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("dial")
    save_model(folder / "model", chat=True, max_position_embeddings=1024)
    adapter = write_adapter(folder / "adapter", max_position_embeddings=1024)
    model, tokenizer = load_model(str(folder / "model"))
    options: dict[str, Any] = {"kv_memory": "200KiB", "page_size": 8, "max_num_seqs": 8}
    llm = LLM(model, tokenizer=tokenizer, adapter=str(adapter), cr=4, **options)
    yield llm
    assert_empty(llm)


def call(server: Running, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_by_hand(adapted: LLM) -> None:
    before = adapted.offset
    with serving(adapted, dial=Dial(llm=adapted, cr=4, low=2, high=8)) as server:
        assert call(server, "/status")[1]["dial"] == {"cr": 4, "low": 2, "high": 8, "open": True}
        status, reply = call(server, "/dial", {"cr": 6})
        assert (status, reply["dial"]["cr"]) == (200, 6)
        assert adapted.offset > before
        for wrong in (1.5, 9, "much"):
            assert call(server, "/dial", {"cr": wrong})[0] == 400
        with urllib.request.urlopen(server.url + "/metrics", timeout=30) as reply:
            text = reply.read().decode()
        assert 'sparsekv:dial_cr{model_name="tiny"} 6.0' in text
        assert 'sparsekv:dial_changes_total{model_name="tiny"} 1.0' in text
        server.service.dial.turn(4)  # type: ignore[union-attr]
    assert adapted.offset == before
    with serving(adapted) as server:
        assert call(server, "/status")[1]["dial"] is None
        assert call(server, "/dial", {"cr": 6})[0] == 409


def test_by_pressure(adapted: LLM) -> None:
    """Up while a pool too small is full, down again when it is free, never past the bounds."""
    dial = Dial(llm=adapted, cr=2, low=2, high=6, adaptive=True)
    adapted.set_cr(2)
    with serving(adapted, dial=dial) as server:
        assert call(server, "/dial", {"cr": 3})[0] == 409
        stream = server.client().completions.create(
            model="tiny", prompt="The old", n=8, max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        seen = [2.0]
        for _ in stream:
            dial.follow_pressure()  # beside the server's own looks, which may be too rare for so short a stream
            seen.append(dial.cr)
        assert max(seen) > 2
        assert all(2 <= cr <= 6 for cr in seen)
        dial.turn(6)
        wait_for(lambda: dial.cr < 6, 10)  # by those
        while dial.cr > 2:
            dial.follow_pressure()
        assert dial.turned >= 2
        assert adapted.offset == adapted._adapter.offset_for(2)  # type: ignore[union-attr]


def test_bounds(adapted: LLM) -> None:
    assert bounds("4:8") == (4.0, 8.0)
    for wrong in ("4", "8:4", "a:b", "0.5:2", "2:inf", ""):
        with pytest.raises(ValueError, match="adaptive-cr"):
            bounds(wrong)
    with pytest.raises(ValueError, match="not between"):
        Dial(llm=adapted, cr=1, low=2, high=4)
    with pytest.raises(ValueError, match="ratios up to 8"):
        Dial(llm=adapted, cr=4, high=9)
