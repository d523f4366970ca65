"""The side of vLLM's workers: where tokens are kept and attended to."""
