"""What a backward needs is kept before the product, by whoever is asked to keep tensors; gradients stay the same."""

from __future__ import annotations

import pytest
import torch
from operations import Operations
from tiny_models import adapted, layers_of, llama, tokens
from torch.utils.checkpoint import checkpoint

import paca
from paca.quantised import ColumnsAlone

HOW = [{"residency": "resident"}, {"residency": "swap"}, {"selection": "mask_random"}]


def gradients(model, **how):
    """Return the gradients of two backwards of one loss."""
    model.zero_grad()
    with how.get("keeping", torch.enable_grad()):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its name before transformers 5
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("recomputed", [False, True])
def test_tensors_that_are_kept_elsewhere_give_the_same_gradients(how, recomputed):
    model = adapted(llama(use_cache=False), **how).train()
    expected = gradients(model)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    found = gradients(model, keeping=torch.autograd.graph.save_on_cpu())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("how", HOW)
def test_a_layer_at_the_end_of_what_is_recomputed_is_not_multiplied_again(how):
    layer = layers_of(adapted(llama(), **how))[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y = checkpoint(lambda x: layer(x.sin()), x, use_reentrant=False)
    with Operations() as calls:
        y.sum().backward()
    assert calls.names.count("sin") == 1
    assert calls.names.count("mm") == 2  # dX and the gradient of what trains
    assert layer.paca_delta["default"].grad is not None


def test_nor_are_columns_that_a_quantised_layer_adds_alone():
    x = torch.randn(3, 6, requires_grad=True)
    delta, index = torch.randn(5, 2, requires_grad=True), torch.tensor([1, 4])
    ops = paca.get_backend().ops

    def columns(x):
        wide = x.sin()
        return ColumnsAlone.apply(wide, wide.detach()[:, index], delta, index, 1.0, ops)

    y = checkpoint(columns, x, use_reentrant=False)
    with Operations() as calls:
        y.sum().backward()
    assert calls.names.count("sin") == 1
    assert calls.names.count("mm") == 2


@pytest.mark.parametrize("how", HOW)
def test_nothing_is_kept_with_the_graph_that_it_came_from(how):
    layer, kept = layers_of(adapted(llama(), **how))[0], []
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x.sin())
    assert all(tensor.grad_fn is None for tensor in kept)
