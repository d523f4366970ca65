"""DMS in unmodified vLLM. vLLM imports `register` by its entry point `vllm.general_plugins`; see docs/vllm.md.

A vLLM block is a credit, a page for every layer and KV head; the scheduler's manager hands out credits and rows
(`scheduler`), the workers keep pages, lengths and tables, and have our attention in the layers of the models that they
load (`worker`); a KV connector carries rows out and reports in (`connector`).
"""

# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false

import logging

from sparsekv.integrations.vllm.arguments import engine_args, serve_arguments
from sparsekv.integrations.vllm.versions import refusal

__all__ = ["engine_args", "register", "serve_arguments"]


def register() -> None:
    """Make `--load-format sparsekv` known to vLLM in this process. Called by vLLM, in each of its processes, whether or
    not the plugin is used: in a vLLM of another version it says so in the log and does nothing."""
    from vllm.version import __version__

    reason = refusal(__version__)
    if reason is not None:
        logging.getLogger(__name__).warning("sparsekv's plugin is off: %s", reason)
        return
    from sparsekv.integrations.vllm.plugin import register_parts

    register_parts()
