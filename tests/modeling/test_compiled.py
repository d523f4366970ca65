"""Compiled layers give the step of plain ones, with as many graphs whatever the depth, and leave no trace."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sparsekv
from helpers import random_heads, tiny_model, tokens
from sparsekv import dms
from sparsekv.modeling import contexts
from sparsekv.modeling.compiled import compiled_layers
from sparsekv.modeling.split import SplitModel


def trainable(layers: int, family: str = "Llama", **config):
    model = tiny_model(family, num_hidden_layers=layers, **config)
    sparsekv.attach(model, policy="dms", window=4)
    model.requires_grad_(False)
    for head in sparsekv.heads(random_heads(model)):
        head.requires_grad_(True)
    with contexts.dense(model):
        return model, SplitModel(model)


def gradients(split: SplitModel) -> list[Tensor]:
    """Of the divergence to the heads, after one step of training."""
    model, ids = split.model, tokens(2, 20).to(split.model.device)
    torch.manual_seed(0)
    with contexts.dense(model), torch.no_grad():
        teacher = split.hidden(ids)
    with contexts.soft(model, tau=0.1):
        split.divergence(teacher, split.hidden(ids), dms.kl_teacher_student).backward()
    found = [p.grad for head in sparsekv.heads(model) for p in head.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_step_is_the_same_and_compiles_no_more_for_more_layers(family):
    graphs = []
    for layers in (2, 3):
        torch.compiler.reset()
        model, split = trainable(layers, family)
        plain, counter = gradients(split), CompileCounterWithBackend("aot_eager")
        with compiled_layers(model, backend=counter):
            for _ in range(2):
                for ours, theirs in zip(gradients(split), plain, strict=True):
                    torch.testing.assert_close(ours, theirs)
        graphs.append(counter.frame_count)
        for ours, theirs in zip(gradients(split), plain, strict=True):
            assert torch.equal(ours, theirs)
    assert 0 < graphs[0] == graphs[1]


def test_on_a_cpu_layers_stay_as_they_are():
    model, _ = trainable(2)
    with compiled_layers(model):
        assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.gpu
def test_a_step_on_a_gpu():
    model, split = trainable(3, head_dim=16)
    model.cuda()
    plain = gradients(split)
    with compiled_layers(model):
        for ours, theirs in zip(gradients(split), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
