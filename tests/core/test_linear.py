"""The linear map against float64 and against what PyTorch itself would do: rules 1, 6, 8, 9 and 10."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import paca
from paca.layer import PacaLayer
from paca.select import random_columns

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make_layer(
    n_in=12,
    n_out=7,
    r=5,
    dtype=torch.float32,
    bias=True,
    conv1d=False,
    alpha=None,
    residency="resident",
    fill=True,
    **strategies,
) -> PacaLayer:
    base = (Conv1D(n_out, n_in) if conv1d else nn.Linear(n_in, n_out, bias=bias)).to(dtype).requires_grad_(False)
    layer = PacaLayer(base, "layer", paca.set_backend("cpu", **strategies), residency)
    layer.update_layer("default", random_columns(n_in, r, 0, "layer"), alpha or r)
    if fill:
        with torch.no_grad():
            layer.paca_delta["default"].normal_(std=0.3)
    return layer


def adapted_weight(layer: PacaLayer) -> torch.Tensor:
    """The weight the layer should compute with, (out, in), from its definition."""
    weight = layer.pretrained_weight().clone()
    index, delta = layer.paca_indices["default"], layer.paca_delta["default"].detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight[:, index] = (weight[:, index].to(wide) + delta * layer.scaling["default"]).to(weight.dtype)
    return weight


def gamma(n: int, unit: float) -> float:
    """Higham, Accuracy and Stability of Numerical Algorithms (2002), lemma 3.1: bounds n roundings in any order."""
    return n * unit / (1 - n * unit)


def assert_within_bound(found, exact, magnitude, length, dtype, accumulated_in=torch.float32, between=0.0):
    """|found − exact| ≤ γ_n·Σ|a||b| + rounding of the result, elementwise.

    Two units a step, for accumulators that truncate. `between`: values that may be rounded to the dtype on the way.
    """
    assert found.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else accumulated_in
    bound = gamma(2 * max(length, 1), UNIT_ROUNDOFF[wide]) * magnitude
    bound = bound + UNIT_ROUNDOFF[dtype] * (exact.abs() + bound + 2 * between) + torch.finfo(dtype).tiny
    error = (found.double() - exact).abs()
    assert bool((error <= bound).all()), f"largest excess {(error - bound).max():.3e}"


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3)


@settings(max_examples=120, deadline=None)
@given(
    lead=shapes,
    n_in=st.integers(1, 33),
    n_out=st.integers(1, 17),
    part=st.floats(0, 1),
    dtype=st.sampled_from(list(UNIT_ROUNDOFF)),
    bias=st.booleans(),
    conv1d=st.booleans(),
    alpha=st.sampled_from([1, 3, 8]),
    residency=st.sampled_from(["resident", "swap"]),
    strided=st.booleans(),
    gather=st.sampled_from(["index_select", "one_hot"]),
    grad_columns=st.sampled_from(["thin_first", "matmul"]),
    write=st.sampled_from(["index_copy", "index_put"]),
    seed=st.integers(0, 2**20),
)
def test_output_and_gradients_stay_within_the_rounding_bound_of_float64(
    lead, n_in, n_out, part, dtype, bias, conv1d, alpha, residency, strided, gather, grad_columns, write, seed
):
    torch.manual_seed(seed)
    r = 1 + int(part * (n_in - 1))
    layer = make_layer(
        n_in, n_out, r, dtype, bias, conv1d, alpha, residency, gather=gather, grad_columns=grad_columns, write=write
    )
    own_bias = layer.get_base_layer().bias
    if own_bias is not None:
        own_bias.requires_grad_(True)
    x = torch.randn(*lead, n_in, dtype=dtype)
    x = x.repeat_interleave(2, dim=-1)[..., ::2] if strided else x
    x.requires_grad_(True)
    y = layer(x)
    gy = torch.randn_like(y)
    y.backward(gy)

    w64, x64, g64 = adapted_weight(layer).double(), x.detach().double(), gy.double()
    b64 = torch.zeros(n_out, dtype=torch.float64) if own_bias is None else own_bias.detach().double()
    product = x64 @ w64.t()
    # Where `x` is strided, PyTorch's own linear rounds the product before it adds the bias.
    between = product.abs() if own_bias is not None else 0.0
    assert_within_bound(y, product + b64, x64.abs() @ w64.abs().t() + b64.abs(), n_in + 1, dtype, between=between)
    assert_within_bound(x.grad, g64 @ w64, g64.abs() @ w64.abs(), n_out, dtype)
    scale, index = layer.scaling["default"], layer.paca_indices["default"]
    xs, gt = x64[..., index].reshape(-1, r), g64.reshape(-1, n_out)
    delta = layer.paca_delta["default"]
    assert delta.grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within_bound(
        delta.grad, scale * gt.t() @ xs, scale * gt.abs().t() @ xs.abs(), xs.shape[0] + 1, delta.grad.dtype
    )
    if own_bias is not None:  # PyTorch sums low-precision biases in their own dtype where it likes: allow for it
        assert_within_bound(own_bias.grad, gt.sum(0), gt.abs().sum(0), gt.shape[0], dtype, accumulated_in=dtype)


@pytest.mark.parametrize("defect", ["bf16 accumulation", "scaled twice", "columns in another order", "gradient cast"])
def test_the_bound_catches_real_defects(defect):
    broken = {
        "bf16 accumulation": lambda gy, xs, scale: (xs.bfloat16().t() @ gy.bfloat16()).t().float(),
        "scaled twice": lambda gy, xs, scale: gy.t() @ xs * 2,
        "columns in another order": lambda gy, xs, scale: (gy.t() @ xs).flip(1),
        "gradient cast": lambda gy, xs, scale: (gy.t() @ xs).bfloat16().float(),
    }[defect]
    layer = make_layer(16, 8, 4)
    layer.adapted.ops = replace(layer.adapted.ops, grad_columns=broken)
    x, gy = torch.randn(32, 16), torch.randn(32, 8)
    layer(x).backward(gy)
    xs = x.double()[:, layer.paca_indices["default"]]
    with pytest.raises(AssertionError, match="largest excess"):
        assert_within_bound(
            layer.paca_delta["default"].grad,
            gy.double().t() @ xs,
            gy.double().abs().t() @ xs.abs(),
            len(x) + 1,
            torch.float32,
        )


@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF))
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_a_fresh_adapter_gives_the_bits_of_the_base_layer(dtype, conv1d, lead, residency):
    layer = make_layer(24, 16, 6, dtype, conv1d=conv1d, residency=residency, fill=False)
    x = torch.randn(*lead, 24, dtype=dtype)
    expected = layer.get_base_layer()(x)
    assert torch.equal(layer(x), expected)  # training: through the autograd function
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


class Kept:
    """Counts the bytes autograd keeps, each storage once, parameters left out."""

    def __init__(self, *parameters):
        self.own = {p.untyped_storage().data_ptr() for p in parameters}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residency", ["resident", "swap"])
@pytest.mark.parametrize("gather", ["index_select", "one_hot"])
def test_exactly_r_channels_are_kept_for_backward(dtype, residency, gather):
    layer = make_layer(64, 32, 5, dtype, residency=residency, gather=gather)
    x = torch.randn(10, 64, dtype=dtype, requires_grad=True)
    owned = [layer.adapted.columns.base, layer.adapted.columns.index]  # the layer's own, kept anyway
    with Kept(*layer.parameters(), *owned) as kept:
        layer(x)
    assert kept.bytes == 10 * 5 * dtype.itemsize


def test_nothing_is_kept_without_gradients_and_no_input_for_a_frozen_adapter():
    layer = make_layer(64, 32, 5)
    x = torch.randn(10, 64)
    with Kept(*layer.parameters()) as kept, torch.no_grad():
        layer(x)
    assert kept.bytes == 0
    layer.paca_delta["default"].requires_grad_(False)
    with Kept(*layer.parameters()) as kept:
        layer(x.requires_grad_(True))
    assert kept.bytes == 0


def test_layers_that_read_the_same_input_gather_once_and_keep_it_once():
    first = make_layer(64, 32, 5)
    second = make_layer(64, 16, 5)
    gathers = []
    counting = replace(first.adapted.ops, gather=lambda x, index: gathers.append(1) or x.index_select(-1, index))
    first.adapted.ops = second.adapted.ops = counting
    x = torch.randn(10, 64, requires_grad=True)
    with Kept(*first.parameters(), *second.parameters()) as kept:
        total = first(x).sum() + second(x).sum()
    total.backward()
    assert len(gathers) == 1
    assert kept.bytes == 10 * 5 * 4
    first(x)
    assert len(gathers) == 2  # a new pass gathers anew


def test_a_changed_input_is_gathered_again():
    layer = make_layer(8, 4, 3)
    x = torch.randn(2, 8)
    layer(x).sum().backward()
    first = layer.paca_delta["default"].grad.clone()
    layer.zero_grad()
    x.data.mul_(3)  # leaves no trace in the version count
    layer(x).sum().backward()
    assert torch.allclose(layer.paca_delta["default"].grad, 3 * first)


def test_one_gemm_forward_one_for_the_input_and_one_skinny():
    layer = make_layer(64, 32, 5, bias=False)
    x = torch.randn(10, 64, requires_grad=True)
    layer(x)  # plans
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as forward:
        y = layer(x)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as backward:
        y.sum().backward()

    def products(profile):
        kinds = ("aten::mm", "aten::addmm", "aten::bmm")
        return [event.input_shapes for event in profile.events() if event.name in kinds]

    assert products(forward) == [[[10, 64], [64, 32]]]
    assert sorted(products(backward)) == [[[5, 10], [10, 32]], [[10, 32], [32, 64]]]


def test_no_temporary_of_the_size_of_x_or_w_is_made():
    layer = make_layer(512, 512, 4, bias=False)
    x = torch.randn(512, 512, requires_grad=True)
    layer(x)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        y = layer(x)
        y.backward(torch.ones_like(y))
    full = 512 * 512 * 4
    large = [event for event in profile.events() if event.name == "[memory]" and event.self_cpu_memory_usage >= full]
    made = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage >= full)
    assert made <= 3 * full, [event.name for event in large]  # y, its upstream gradient, and dX; nothing else


@pytest.mark.parametrize("residency", ["resident", "swap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gives_float32_gradients(dtype, residency):
    layer = make_layer(32, 16, 4, residency=residency)
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        expected = torch.nn.functional.linear(x, adapted_weight(layer), layer.get_base_layer().bias)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    gy = torch.randn_like(y)
    y.backward(gy)
    assert x.grad.dtype == torch.float32
    (gx,) = torch.autograd.grad(expected, x, gy)
    assert torch.equal(x.grad, gx)
    xs = x.detach()[:, layer.paca_indices["default"]].to(dtype)
    delta = layer.paca_delta["default"]
    assert delta.grad.dtype == torch.float32
    assert torch.allclose(delta.grad, gy.float().t() @ xs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_checkpointing_gives_the_same_bits(reentrant, residency):
    layer = make_layer(16, 16, 4, residency=residency)
    x = torch.randn(3, 16, requires_grad=True)

    def run(wrap):
        layer.zero_grad()
        x.grad = None
        wrap(lambda t: layer(torch.tanh(layer(t)))).square().sum().backward()
        return x.grad.clone(), layer.paca_delta["default"].grad.clone()

    plain = run(lambda f: f(x))
    saved = run(lambda f: checkpoint(f, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_a_second_derivative_is_refused_not_wrong():
    layer = make_layer()
    x = torch.randn(2, 12, requires_grad=True)
    (gx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


def test_a_change_between_forward_and_backward_is_refused():
    layer = make_layer()
    y = layer(torch.randn(2, 12, requires_grad=True)).sum()
    with torch.no_grad():
        layer.paca_delta["default"].add_(1)
    layer.sync()
    with pytest.raises(paca.StaleColumnsError, match="changed between forward and backward"):
        y.backward()


def test_a_reference_pass_between_forward_and_backward_is_allowed():
    layer = make_layer()
    x = torch.randn(2, 12, requires_grad=True)
    layer(x).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    y = layer(x).sum()
    layer.enable_adapters(False)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.get_base_layer()(x))
    layer.enable_adapters(True)
    y.backward()
    assert torch.equal(x.grad, expected)


def test_a_wrong_dtype_is_refused_as_linear_refuses_it():
    layer = make_layer(dtype=torch.bfloat16)
    x = torch.randn(2, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("module", [nn.Embedding(4, 4), nn.Conv2d(3, 3, 1), Embedder()])
def test_an_unsupported_layer_is_named(module):
    with pytest.raises(TypeError, match=rf"adapts torch.nn.Linear and .*Conv1D, found .*{type(module).__name__}"):
        PacaLayer(module, "layer", paca.get_backend())


def test_a_base_weight_that_wants_a_gradient_is_refused_not_left_without():
    layer = make_layer()
    layer.get_base_layer().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"the base weight requires a gradient.*modules_to_save"):
        layer(torch.randn(2, 12))


def test_data_parallel_is_refused_with_the_remedy():
    with pytest.raises(RuntimeError, match="torchrun"):
        make_layer()._replicate_for_data_parallel()
