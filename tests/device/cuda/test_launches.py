"""Over the frozen model a targeted layer costs at most one launch in forward and one in backward, and none in eval.

On the CPU the operations that reach the device are counted; on a GPU the kernels that its profiler sees.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_models import adapted, layers_of, llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from paca import registry
from paca_cuda import CUDABackend

# They make or describe a tensor and launch nothing; views are told by their schemas.
NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "promote_types",
}


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not view and name not in NO_LAUNCH:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.counted.total()


def block_of(monkeypatch, device, dtype, frozen=False, **strategies):
    base = llama(dtype).to(device)
    if frozen:
        return base.requires_grad_(False).model.layers[0]
    monkeypatch.setattr(registry, "_current", CUDABackend(**strategies))
    return adapted(base, paca_alpha=4).base_model.model.model.layers[0]  # s = 1


def run_block(block, device, dtype, grad=True, x=None):
    """Return the block's output for an input that requires a gradient, a fresh one if none is given."""
    x = (torch.randn(2, 16, 32, device=device, dtype=dtype) if x is None else x).requires_grad_(grad)
    angles = torch.randn(1, 16, 8, device=device, dtype=dtype)
    made = block(x, position_embeddings=(angles.cos(), angles.sin()))
    return made[0] if isinstance(made, tuple) else made


def counted(block, grad=True):
    """Count forward and backward; the second pass, when everything has settled."""
    for _ in range(2):
        with Launches() as forward, torch.set_grad_enabled(grad):
            y = run_block(block, "cpu", torch.float32, grad)
        with Launches() as backward:
            if grad:
                y.backward(torch.ones_like(y))
        for parameter in block.parameters():
            parameter.grad = None
    return forward, backward


PLAIN = {"grad_columns": "matmul", "write": "index_copy"}


@pytest.mark.parametrize("shared_input", ["together", "alone"])
@pytest.mark.parametrize("gather", ["index_select"])
def test_a_layer_adds_one_operation_to_forward_and_one_to_backward(monkeypatch, shared_input, gather):
    frozen = counted(block_of(monkeypatch, "cpu", torch.float32, frozen=True))
    block = block_of(monkeypatch, "cpu", torch.float32, shared_input=shared_input, gather=gather, **PLAIN)
    forward, backward = counted(block)
    layers = len(layers_of(block))
    assert layers == 7
    assert forward.total - frozen[0].total == 4  # q, k, v share a gather, so do gate and up
    if shared_input == "alone":
        assert backward.total - frozen[1].total == layers
    else:  # less by the additions that happen inside the GEMMs
        assert backward.total - frozen[1].total == layers - 3


@pytest.mark.parametrize("shared_input", ["together", "alone"])
def test_recomputation_gathers_again_and_leaves_out_the_product_that_the_frozen_model_leaves_out(
    monkeypatch, shared_input
):
    def backward_of(block):
        given = torch.randn(2, 16, 32)
        y = checkpoint(lambda x: run_block(block, "cpu", torch.float32, x=x), given, use_reentrant=False)
        with Launches() as backward:
            y.backward(torch.ones_like(y))
        return backward

    frozen = backward_of(block_of(monkeypatch, "cpu", torch.float32, frozen=True))
    found = backward_of(block_of(monkeypatch, "cpu", torch.float32, shared_input=shared_input, **PLAIN))
    assert found.total - frozen.total == 4 + (7 if shared_input == "alone" else 4)


def test_evaluation_costs_what_the_frozen_model_costs(monkeypatch):
    frozen, _ = counted(block_of(monkeypatch, "cpu", torch.float32, frozen=True).eval(), grad=False)
    found, _ = counted(block_of(monkeypatch, "cpu", torch.float32, **PLAIN).eval(), grad=False)
    assert found.counted == frozen.counted


def test_the_kernels_are_one_operation_each(device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("with a GPU the profiler counts")
    frozen = counted(block_of(monkeypatch, "cpu", torch.float32, frozen=True))
    strategies = {"gather": "triton", "grad_columns": "triton", "shared_input": "alone"}
    forward, backward = counted(block_of(monkeypatch, "cpu", torch.float32, **strategies))
    added = forward.counted - frozen[0].counted
    assert added == {"gather": 4}
    assert backward.counted - frozen[1].counted == {"grad_columns": 7}


@pytest.mark.parametrize("shared_input", ["together", "alone"])
def test_the_default_strategies_add_one_operation_each_way(device, monkeypatch, shared_input):
    if device.type != "cpu":
        pytest.skip("with a GPU the profiler counts")
    frozen = counted(block_of(monkeypatch, "cpu", torch.float32, frozen=True))
    forward, backward = counted(block_of(monkeypatch, "cpu", torch.float32, shared_input=shared_input))
    assert forward.counted - frozen[0].counted == {"index_select": 4}
    assert backward.counted["grad_columns"] == 7
    assert backward.total - frozen[1].total == (7 if shared_input == "alone" else 4)


def kernels_in(run):
    """Names of the kernels that a function launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    launched = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in launched if not event.name.startswith(("Memcpy", "Memset"))]


@pytest.mark.parametrize("shared_input", ["together", "alone"])
def test_the_profiler_sees_one_more_kernel_each_way(gpu, monkeypatch, shared_input):
    counts = []
    for frozen in (True, False):
        strategies = {"grad_columns": "triton", "shared_input": shared_input}
        block = block_of(monkeypatch, gpu, torch.bfloat16, frozen=frozen, **strategies)
        made = []
        for _ in range(2):
            run_block(block, gpu, torch.bfloat16).sum().backward()
        forward = kernels_in(lambda block=block, made=made: made.append(run_block(block, gpu, torch.bfloat16)))
        gradient = torch.ones_like(made[0])
        for parameter in block.parameters():
            parameter.grad = None
        backward = kernels_in(lambda made=made, gradient=gradient: made[0].backward(gradient))
        counts.append((len(forward), len(backward)))
    (frozen_forward, frozen_backward), (forward, backward) = counts
    assert forward - frozen_forward <= 4
    assert backward - frozen_backward <= (7 if shared_input == "alone" else 4)
