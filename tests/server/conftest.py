"""One server of the tiny model for the tests that leave it as it was."""

from collections.abc import Iterator

import pytest

from http_serving import Running, serving, tiny_llm
from serving import assert_empty


@pytest.fixture(scope="package")
def running() -> Iterator[Running]:
    with serving(tiny_llm()) as server:
        yield server
        assert_empty(server.llm)
