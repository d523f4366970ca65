"""Requests in, tokens out: continuous batching over one pool of pages, on plain Transformers models."""

from sparsekv.engine.kv import KVHistory, RequestKV
from sparsekv.engine.llm import LLM
from sparsekv.engine.outputs import CompletionOutput, Logprob, RequestOutput, Session
from sparsekv.engine.params import SamplingParams
from sparsekv.engine.thinking import ThinkingBudget

__all__ = [
    "LLM",
    "CompletionOutput",
    "KVHistory",
    "Logprob",
    "RequestKV",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "ThinkingBudget",
]
