"""schemathesis drives the OpenAPI description: whatever it sends, nothing is answered with a 5xx."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from http_serving import Running, serving, tiny_llm
from serving import assert_empty

EXAMPLES = 20
ASKED = ("/v1/chat/completions", "/v1/completions", "/v1/models/{name}", "/tokenize", "/detokenize", "/dial")
CASES = [(path, mode) for path in ASKED for mode in GenerationMode if (path, mode.value) != (ASKED[2], "negative")]
"""Any text is a name that a model may have."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(tiny_llm(), deadline=0.3) as running:
        yield running
        assert_empty(running.llm)


@pytest.fixture(scope="module")
def api(server: Running) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_no_request_is_answered_by_a_failure(api: schemathesis.BaseSchema, path: str, mode: GenerationMode) -> None:
    operation = api[path]["GET" if path.startswith("/v1/models") else "POST"]

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # else nearly all end at a model that is not there
        response = case.call(timeout=30)
        assert response.status_code < 500
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()


def test_the_description_names_every_route(api: schemathesis.BaseSchema) -> None:
    paths = {operation.ok().path for operation in api.get_all_operations()}
    assert set(ASKED) <= paths
    assert paths - set(ASKED) <= {
        "/v1/models",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/status",
    }  # these take nothing
