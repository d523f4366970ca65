"""A scorer over HTTP: what is sent and read, what is tried again, and what is said in the end."""

from collections.abc import Iterator
from typing import Any

import pytest

from scoring import Server, steps
from sparsekv.scaling.scorer import Scorer, ScorerError, best


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def scorer(url: str, **options: Any) -> Scorer:
    return Scorer(url=url, model="prm", pause=0.01, parallel=1, **options)


@pytest.mark.parametrize(("reduce", "expected"), [("min", 0.25), ("last", 0.5), ("product", 0.125)])
def test_steps_become_one_score(server: Server, reduce: str, expected: float) -> None:
    server.replies = [(200, steps([0.75, 0.25], [0.0, 1.0], [0.5, 0.5]))]
    assert scorer(server.url, reduce=reduce).scores([("2+2?", "4")]) == [expected]
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert server.seen == [{"model": "prm", "messages": messages}]


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.replies = [(503, b""), (429, b""), (200, b"not yet"), (200, steps(0.5))]
    assert scorer(server.url).scores([("a", "b"), ("c", "d")]) == [0.5, 0.5]
    assert len(server.seen) == 5


def test_what_does_not_answer_is_one_sentence(server: Server) -> None:
    server.replies = [(500, b"")]
    with pytest.raises(ScorerError, match=r"did not answer in 4 tries \(status 500\); start it and go on"):
        scorer(server.url).scores([("a", "b")])
    assert len(server.seen) == 4
    server.replies = [(404, b"")]
    with pytest.raises(ScorerError, match="refuses the request with status 404"):
        scorer(server.url).scores([("a", "b")])
    server.replies = [(200, {"error": "no"})]
    with pytest.raises(ScorerError, match="without data"):
        scorer(server.url).scores([("a", "b")])
    server.close()
    with pytest.raises(ScorerError, match="refused"):
        scorer(server.url, tries=2).scores([("a", "b")])


def test_settings() -> None:
    for wrong, said in [
        ({"url": "ftp://x"}, "begins with http"),
        ({"reduce": "mean"}, "use one of min, last, product"),
    ]:
        with pytest.raises(ValueError, match=said):
            Scorer(**{"url": "http://x", "model": "m"} | wrong)


def test_the_best_has_an_answer() -> None:
    assert best(["7", None, "8"], [0.1, 0.9, 0.3]) == 2
    assert best(["7", "8"], [0.5, 0.5]) == 0
    assert best([None], [1.0]) is None
