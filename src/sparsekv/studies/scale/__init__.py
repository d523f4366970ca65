"""Inference-time hyper-scaling: what W chains of L tokens at a compression ratio get right, and what they cost."""
