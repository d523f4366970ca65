"""The side of vLLM's scheduler: what requests may take."""
