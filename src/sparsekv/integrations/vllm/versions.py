"""Which versions of vLLM the plugin was tested with."""

import re

OLDEST, NEWEST = (0, 26), (0, 32)
"""Minor releases, both included. The tests run at the ends: `make test-vllm`."""


def refusal(version: str) -> str | None:
    """Why the plugin cannot run in this vLLM, as a sentence; None if it can."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    first, last = (".".join(map(str, x)) for x in (OLDEST, NEWEST))
    known = f"{first}.x" if first == last else f"{first}.x to {last}.x"
    return f"it was tested with vLLM {known} and this is {version}; install such a vLLM, or a newer sparsekv"
