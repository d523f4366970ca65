"""A scorer over HTTP: what is sent and read, what is tried again, and what is said in the end."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sparsekv.scaling.scorer import Scorer, ScorerError, best


class Server:
    """Answers with what `replies` says: (status, body) in turn, the last one again and again."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any]] = []
        self.seen: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, body = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/pooling"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def steps(*values: Any) -> dict[str, Any]:
    return {"data": [{"data": list(values)}]}


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
