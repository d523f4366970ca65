"""Inference-time hyper-scaling: what W chains of L tokens at a compression ratio are right about, and what they cost."""
