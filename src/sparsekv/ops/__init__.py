"""The operations on pages. Each has one public function in `api.py`, a plain PyTorch `reference.py` (the oracle and the
CPU path) and, where a GPU gains from it, a `triton.py`. References and kernels never import each other."""
