"""The one executor: a step of a layer through its policy, over a cache of pages or over none."""

from sparsekv.attend.allocate import allocate, choose_page_size, page_bytes
from sparsekv.attend.executor import Executor, Part
from sparsekv.attend.layer import decode_layer, finish_prompts, prefill_layer
from sparsekv.attend.whole import whole_layer

__all__ = [
    "Executor",
    "Part",
    "allocate",
    "choose_page_size",
    "decode_layer",
    "finish_prompts",
    "page_bytes",
    "prefill_layer",
    "whole_layer",
]
