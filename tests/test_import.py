"""Importing sparsekv is free: it loads no framework, and its public names arrive on first use."""

import subprocess
import sys

import pytest

import sparsekv


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_loads_neither_torch_nor_transformers():
    loaded = _run("import sys, sparsekv; sparsekv.__version__; print([m for m in sys.modules])")
    assert "'sparsekv'" in loaded
    for heavy in ("'torch'", "'transformers'", "'numpy'"):
        assert heavy not in loaded


def test_fetching_names_does_not_load_a_framework():
    loaded = _run("import sys, sparsekv; sparsekv.fetch_model; print([m for m in sys.modules])")
    assert "'sparsekv.assets.embedded'" in loaded
    assert "'torch'" not in loaded


@pytest.mark.parametrize("name", sorted(set(dir(sparsekv)) - {"__version__"}))
def test_every_public_name_resolves_to_itself(name):
    assert getattr(sparsekv, name).__name__ == name


def test_integrations_need_no_import_of_their_own():
    """And not the engine that they are for, until vLLM itself asks."""
    code = "import sys, sparsekv; print(sparsekv.integrations.vllm.engine_args.__name__, 'vllm' in sys.modules)"
    assert _run(code).split() == ["engine_args", "False"]
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        sparsekv.integrations.nonesuch  # noqa: B018


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        sparsekv.nonesuch  # noqa: B018
