"""What LLM and attach are given wrongly: one sentence that names it, and the model as it was."""

import pytest
import torch

import sparsekv
from helpers import tiny_model
from sparsekv import LLM, SamplingParams, SparseCache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 0.5}, "LLM does not know gpu_memory_utilization; kv_memory=0.5 takes half"),
        (
            {"tensor_parallel_size": 2},
            "LLM does not know tensor_parallel_size; an engine runs on one GPU; it",
        ),
        ({"polcy": "tova"}, "LLM does not know polcy; it takes kv_memory"),
        ({"policy": "streaming", "budget": 9, "sink": 1}, "LLM does not know sink; .*, budget, sinks"),
        ({"policy": "streaming", "budget": "9"}, "budget is '9'; it counts tokens, so use an integer"),
        ({"policy": 3}, "policy is 3; pass a name, or a Policy"),
        ({"cr": "4", "policy": "tova"}, "cr is '4'; use a number"),
        ({"page_size": 1.5}, "page_size is 1.5; use an integer"),
        ({"enforce_eager": "yes"}, "enforce_eager is 'yes'; use True or False"),
        ({"max_model_len": 10**6}, "max_model_len is 1000000 and the model's context is 256"),
        ({"kv_memory": "1B"}, "holds no page"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(options, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        LLM(model, **options)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model, "sparsekv_attachment")


def test_an_attached_model_stays_attached():
    model = tiny_model()
    sparsekv.attach(model, policy="dense")
    for options in ({"max_model_len": 10**6}, {"gpu_memory_utilization": 0.5}):
        with pytest.raises(ValueError, match=r"max_model_len is|LLM does not know"):
            LLM(model, **options)
    assert model.config._attn_implementation == "sparsekv"


def test_wrong_types():
    for call in (lambda: sparsekv.attach(None, policy="dms"), lambda: sparsekv.attach("smollm2-135m", policy="dms")):
        with pytest.raises(ValueError, match="attach takes a Transformers model, and this is a"):
            call()
    with pytest.raises(ValueError, match="model is a NoneType; pass a name"):
        LLM(None)
    with pytest.raises(ValueError, match="stop_token_ids is 5; use a list of token ids"):
        SamplingParams(stop_token_ids=5)
    model = tiny_model()
    with pytest.raises(ValueError, match="adapter is 3; pass a folder or a hub id"):
        sparsekv.attach(model, adapter=3)
    llm = LLM(model, kv_memory="1MiB")
    with pytest.raises(ValueError, match=r"the prompts are a tensor; pass lists of token ids"):
        llm.generate(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"page_size is 1.5; it counts token slots"):
        SparseCache(model, page_size=1.5)
