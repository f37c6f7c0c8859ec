"""Rule 10: torch.compile takes a decoder block in one graph, and compiles it once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

import paca
from paca.layer import PacaLayer

# What Dynamo and Inductor do inside themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def make_model(**config):
    torch.manual_seed(0)
    torch._dynamo.reset()
    llama = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation="sdpa",
        use_cache=False,  # a cache makes each block another one
    )
    return get_peft_model(
        LlamaForCausalLM(llama), paca.PacaConfig(r=4, paca_alpha=8, target_modules="all-linear", **config)
    )


def train(model, steps=4, compiled=None):
    """Return the losses of some steps; `compiled` stands for the model's decoder blocks."""
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        paca.verify(model)
    return torch.stack(losses)


def compile_blocks(model, backend):
    for block in model.base_model.model.model.layers:
        block.compile(fullgraph=True, backend=backend)  # a graph break is an error


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_decoder_blocks_compile_whole_and_once_and_train_as_eager_does(residency):
    model = make_model(residency=residency)
    expected = train(copy.deepcopy(model))
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, counter)
    losses = train(model)
    assert torch.allclose(losses, expected, rtol=1e-6, atol=1e-6)
    assert losses[-1] < losses[0] - 0.05  # later steps saw what earlier ones wrote
    # The first block's input needs no gradient; all others share a graph, though their columns differ. Later steps need
    # none.
    assert counter.frame_count == 2


def test_inductor_trains_as_eager_does():
    model = make_model()
    expected = train(copy.deepcopy(model), steps=3)
    model.base_model.model.model.layers[0].mlp.compile(fullgraph=True, backend="inductor")
    assert torch.allclose(train(model, steps=3), expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_follows_switches_and_loads():
    model = make_model()
    ids = torch.randint(0, 64, (2, 8))
    base = model(ids).logits
    train(model, steps=2)
    adapted = model(ids).logits
    assert not torch.equal(base, adapted)
    compile_blocks(model, "aot_eager")
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(model(ids).logits, adapted, **close)
    with model.disable_adapter():
        assert torch.allclose(model(ids).logits, base, **close)
    assert torch.allclose(model(ids).logits, adapted, **close)
    model.load_state_dict({k: torch.zeros_like(v) if "paca_delta" in k else v for k, v in model.state_dict().items()})
    assert torch.allclose(model(ids).logits, base, **close)
    assert all(layer.adapted.held.key is not None for layer in model.modules() if isinstance(layer, PacaLayer))
