"""Layers that read the same tensor run together: one sum of input gradients, inside the GEMMs, and the same results.

All of it is plain torch, so it is shown on the CPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from operations import Operations
from tiny_models import adapted, layers_of, llama, perturb, recompute, tokens, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import paca
from paca import registry
from paca.errors import StaleColumnsError
from paca_cuda import CUDABackend

PLAIN = {"grad_columns": "matmul", "write": "index_copy"}


def made(monkeypatch, shared_input, base=None, **config):
    monkeypatch.setattr(registry, "_current", CUDABackend(shared_input=shared_input, **PLAIN))
    return adapted(llama() if base is None else base, **config)


def gradients(model, **kwargs):
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=tokens(), **kwargs).loss
    loss.backward()
    found = [loss.detach(), embedded.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("share_columns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_are_those_of_layers_that_run_alone(monkeypatch, share_columns, dtype):
    found, expected = (
        gradients(perturb(made(monkeypatch, how, base=llama(dtype), share_columns=share_columns)))
        for how in ("together", "alone")
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-7)
    assert torch.equal(found[0], expected[0])  # forward does the same products


@pytest.mark.parametrize("share_columns", [True, False])
def test_a_block_gathers_once_for_each_input_and_adds_no_gradients_of_its_size(monkeypatch, share_columns):
    counts = {}
    for how in ("together", "alone"):
        model = made(monkeypatch, how, share_columns=share_columns)
        block, x = model.base_model.model.model.layers[0].self_attn, torch.randn(2, 5, 32, requires_grad=True)
        with Operations() as calls:
            torch.autograd.backward(
                [block.q_proj(x), block.k_proj(x), block.v_proj(x)], [torch.randn(2, 5, n) for n in (32, 16, 16)]
            )
        counts[how] = {name: calls.names.count(name) for name in ("index_select", "mm", "addmm_", "add", "add_")}
    gathers = 1 if share_columns else 3
    assert counts["together"] == {"index_select": 1, "mm": 3 + 1 + 3, "addmm_": 2, "add": 0, "add_": 0}
    assert counts["alone"]["index_select"] == gathers
    assert counts["alone"]["add"] + counts["alone"]["add_"] == 2


def test_training_follows_layers_that_run_alone(monkeypatch):
    together, alone = (train(made(monkeypatch, how), steps=4) for how in ("together", "alone"))
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch, reentrant):
    plain = made(monkeypatch, "together")
    again = recompute(copy.deepcopy(plain), reentrant)
    for a, b in zip(gradients(again.train()), gradients(plain.train()), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert all(layer.shared_input is None or layer.shared_input.together for layer in layers_of(again))


def test_copies_run_with_their_own_neighbours(monkeypatch):
    model = made(monkeypatch, "together")
    copied = copy.deepcopy(model)
    for layer, other in zip(layers_of(model), layers_of(copied), strict=True):
        if other.shared_input is not None:
            assert any(member is other for member in other.shared_input.layers)
            assert not any(member is layer for member in other.shared_input.layers)


class Mixed(nn.Module):
    """Calls the members of a row on tensors of the caller's choice."""

    def __init__(self, width=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x, y, leave_out=False):
        q = self.q_proj(x)
        return q if leave_out else q + self.k_proj(y) * self.v_proj(y)


def mixed(monkeypatch, how="together"):
    torch.manual_seed(1)
    return made(monkeypatch, how, base=Mixed(), target_modules=["q_proj", "k_proj", "v_proj"], task_type=None)


def test_a_row_that_reads_different_tensors_is_left_alone_and_right(monkeypatch):
    """Cross-attention: q reads the decoder, k and v the encoder."""
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    found = {}
    for how in ("together", "alone"):
        model = mixed(monkeypatch, how)
        for _ in range(3):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            model(a, b).sum().backward()
        found[how] = [a.grad, b.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        if how == "together":
            assert not layers_of(model)[0].shared_input.together
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_output_that_is_not_used_has_no_part_in_the_gradient(monkeypatch):
    x, model = torch.randn(3, 8, requires_grad=True), mixed(monkeypatch)
    model(x, x, leave_out=True).sum().backward()
    layers = layers_of(model)
    assert torch.allclose(x.grad, torch.ones(3, 8) @ layers[0].get_base_layer().weight)
    assert layers[0].paca_delta["default"].grad is not None
    assert layers[1].paca_delta["default"].grad is None


def test_a_forward_that_ends_in_an_error_changes_nothing(monkeypatch):
    """As one that runs out of memory does: the next ones still run together."""
    model = mixed(monkeypatch)
    q = layers_of(model)[0]
    for _ in range(3):
        q(torch.randn(3, 8))  # and here it ended
        x = torch.randn(3, 8, requires_grad=True)
        model(x, x).sum().backward()
        assert q.shared_input.together
    for _ in range(3):
        q(torch.randn(3, 8))
    assert not q.shared_input.together


def test_a_tensor_that_changed_in_place_is_read_anew(monkeypatch):
    model = mixed(monkeypatch)
    q, k, _ = layers_of(model)
    x = torch.randn(3, 8)
    q(x)
    with torch.no_grad():
        x.mul_(2)
    assert torch.equal(k(x), k.get_base_layer()(x))


def test_columns_that_change_before_an_output_is_collected_are_seen(monkeypatch):
    model = mixed(monkeypatch)
    q, k, _ = layers_of(model)
    x = torch.randn(3, 8)
    q(x)
    with torch.no_grad():
        k.paca_delta["default"].fill_(1.0)
    assert torch.equal(k(x), k.get_base_layer()(x))
    paca.verify(model)


def test_a_change_before_backward_is_refused(monkeypatch):
    model = mixed(monkeypatch)
    x = torch.randn(3, 8, requires_grad=True)
    y = model(x, x)
    with torch.no_grad():
        layers_of(model)[1].paca_delta["default"].fill_(1.0)
    layers_of(model)[1].sync()
    with pytest.raises(StaleColumnsError, match="between forward and backward"):
        y.sum().backward()


def test_a_frozen_neighbour_makes_each_run_alone(monkeypatch):
    model = mixed(monkeypatch)
    layers_of(model)[1].paca_delta["default"].requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    model(x, x).sum().backward()
    assert layers_of(model)[0].paca_delta["default"].grad is not None
    assert layers_of(model)[1].paca_delta["default"].grad is None


def test_a_checkpointed_part_of_a_row_is_right(monkeypatch):
    x, model = torch.randn(3, 8), mixed(monkeypatch)
    wanted = x.clone().requires_grad_()
    model(wanted, wanted).sum().backward()
    for _ in range(2):
        found = x.clone().requires_grad_()
        checkpoint(lambda x: model(x, x), found, use_reentrant=False).sum().backward()
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_block_compiles_whole_and_its_layers_run_alone_in_it(monkeypatch):
    torch._dynamo.reset()
    model = made(monkeypatch, "together")
    expected = train(copy.deepcopy(model), steps=2)
    for block in model.base_model.model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    assert torch.allclose(torch.tensor(train(model, steps=2)), torch.tensor(expected), rtol=1e-5)
