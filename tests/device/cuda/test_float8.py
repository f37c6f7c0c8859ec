"""gemm="fp8": the frozen part of a weight is multiplied in float8, its trained columns as exactly as ever.

The CPU multiplies float8 too, so all of it runs without a GPU; with one the same tests run there.
"""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import adapted, layers_of, llama, perturb, recompute, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import paca
from paca import registry
from paca.bench.kept import count_kept
from paca.errors import BackendUnavailableError
from paca.layer import PacaLayer
from paca_cuda import CUDABackend
from paca_cuda.float8 import float8_products, quantised_rows, why_no_float8

PLAIN = {"grad_columns": "matmul", "write": "index_copy"}
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def place() -> torch.device:
    """Where float8 is multiplied in this process."""
    if not torch.cuda.is_available():
        q, scale = torch.zeros(16, 16).to(E4M3), torch.ones(16, 1)
        try:
            torch._scaled_mm(q, q.t(), scale, scale.t(), out_dtype=torch.bfloat16)
        except RuntimeError:
            pytest.skip(f"torch {torch.__version__} multiplies float8 on a CPU with one scale for a whole matrix only")
        return torch.device("cpu")
    if why := why_no_float8():
        pytest.skip(why)
    return torch.device("cuda")


def layer_on(place, n_in=48, n_out=32, r=5, dtype=torch.bfloat16, bias=True, gemm="fp8"):
    torch.manual_seed(0)
    base = nn.Linear(n_in, n_out, bias=bias).requires_grad_(False).to(place, dtype)
    layer = PacaLayer(base, "layer", CUDABackend(gemm=gemm, **PLAIN))
    layer.update_layer("default", torch.randperm(n_in)[:r].sort().values, alpha=2 * r)
    return layer


def step(layer, x, gy):
    """Return y, dX and dΔ."""
    delta, x = layer.paca_delta["default"], x.detach().clone().requires_grad_()
    delta.grad = None
    y = layer(x)
    y.backward(gy)
    return y.detach(), x.grad, delta.grad


def model_on(place, monkeypatch, gemm="fp8", dtype=torch.bfloat16):
    monkeypatch.setattr(registry, "_current", CUDABackend(gemm=gemm, **PLAIN))
    return adapted(llama(dtype, use_cache=False).to(place)).train()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7),
    n=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_each_row_has_its_own_scale_and_loses_at_most_a_sixteenth(rows, n, exponent, dtype, seed):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    x = (x * 2.0 ** (exponent + 3 * torch.arange(rows)[:, None])).to(dtype)
    q, scale = quantised_rows(x)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (E4M3, x.shape, torch.float32, (rows, 1))
    assert torch.all(q.float().abs().amax(1) == 448)
    error = (q.double() * scale - x.double()).abs()
    # half a unit in the last of three places, or half of the smallest subnormal number
    assert torch.all(error <= x.double().abs() * (2.0**-4 + 2.0**-20) + scale * 2.0**-10 * 1.001)


def test_a_row_of_zeros_stays_zero_and_one_that_overflowed_is_nan():
    q, scale = quantised_rows(torch.tensor([[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0], [2.0, -1.0]]))
    assert torch.equal(q[0].float() * scale[0], torch.zeros(2))
    assert (q[1].float() * scale[1]).isnan().any()
    assert (q[2].float() * scale[2]).isnan().any()
    assert torch.equal(q[3].float() * scale[3], torch.tensor([2.0, -1.0]))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.sampled_from([(1,), (3,), (2, 9), ()]),
    sizes=st.sampled_from([(16, 16), (48, 32), (32, 112)]),
    r=st.integers(1, 16),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    bias=st.booleans(),
)
def test_products_are_those_of_the_dequantised_copy_and_the_exact_columns(place, lead, sizes, r, dtype, bias):
    """The oracle dequantises what was quantised and multiplies in float64."""
    n_in, n_out = sizes
    layer = layer_on(place, n_in, n_out, r, dtype, bias)
    with torch.no_grad():
        layer.paca_delta["default"].normal_(std=0.3)
    x, gy = (torch.randn(*lead, n, device=place).to(dtype) for n in (n_in, n_out))
    found = step(layer, x, gy)
    weight, index = layer.get_base_layer().weight.detach(), layer.paca_indices["default"]
    frozen = weight.index_fill(1, index, 0.0)

    def values(matrix):
        q, scale = quantised_rows(matrix)
        return q.double() * scale.double()

    x2, gy2 = x.reshape(-1, n_in), gy.reshape(-1, n_out)
    columns = weight[:, index].double()
    y = values(x2) @ values(frozen).t() + x2[:, index].double() @ columns.t()
    if bias:
        y += layer.get_base_layer().bias.double()
    gx = values(gy2) @ values(frozen.t()).t()
    gx[:, index] = gy2.double() @ columns
    gdelta = layer.scaling["default"] * gy2.double().t() @ x2[:, index].double()
    wanted = (y.view(*lead, n_out), gx.view(*lead, n_in), gdelta)
    for made, exact, kind in zip(found, wanted, (dtype, dtype, torch.float32), strict=True):
        assert made.dtype == kind
        # bfloat16 is written once by the product, and rounded to again when columns and bias are added
        assert torch.allclose(made.double(), exact, rtol=2.0**-7, atol=2.0**-7 * float(exact.abs().max()))


def test_trained_columns_have_the_bits_of_ordinary_gemms(place):
    """With nothing frozen but zeros, only the trained columns are left to compute."""
    results = []
    for gemm in ("fp8", "torch"):
        layer = layer_on(place, bias=False, gemm=gemm)
        index = layer.paca_indices["default"]
        with layer_free(layer), torch.no_grad():
            kept = layer.get_base_layer().weight[:, index].clone()
            layer.get_base_layer().weight.zero_().index_copy_(1, index, kept)
        torch.manual_seed(1)
        x, gy = torch.randint(-4, 5, (6, 48)).to(place, torch.bfloat16), torch.randint(-4, 5, (6, 32)).to(place)
        results.append((step(layer, x, gy.bfloat16()), index))
    (y, gx, gdelta), index = results[0]
    (exact_y, exact_gx, exact_gdelta), _ = results[1]
    assert torch.allclose(y, exact_y, rtol=2.0**-8, atol=0)
    assert torch.equal(gx[:, index], exact_gx[:, index])
    assert torch.equal(gdelta, exact_gdelta)


class layer_free:
    """Gives a layer's weight back its pretrained values while it is edited."""

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        self.layer.enable_adapters(False)

    def __exit__(self, *_):
        self.layer.enable_adapters(True)


def test_an_optimizer_step_needs_no_new_quantisation_and_the_next_forward_sees_it(place):
    layer = layer_on(place)
    products = layer.adapted.columns.products
    x, gy = torch.randn(4, 48, device=place).bfloat16(), torch.randn(4, 32, device=place).bfloat16()
    optimizer = torch.optim.SGD([layer.paca_delta["default"]], lr=1.0)
    before = step(layer, x, gy)[0]
    optimizer.step()
    after = step(layer, x, gy)[0]
    assert layer.adapted.columns.products is products
    index, update = layer.paca_indices["default"], layer.paca_delta["default"] * layer.scaling["default"]
    change = x[:, index].double() @ update.detach().double().t()
    assert torch.allclose((after - before).double(), change, atol=0.02 * float(change.abs().max()))


def test_evaluation_has_the_bits_of_the_base_model_and_training_is_close_to_it(place, monkeypatch):
    base, model = llama(torch.bfloat16).to(place), model_on(place, monkeypatch)
    ids = tokens().to(place)
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.equal(model.eval()(ids).logits, expected)
    found = model.train()(ids).logits
    assert not torch.equal(found, expected)
    assert float((found.detach() - expected).norm() / expected.norm()) < 0.1


def test_the_weight_is_given_back_bit_for_bit(place, monkeypatch):
    before = llama(torch.bfloat16).state_dict()
    model = model_on(place, monkeypatch)
    train_on(place, model)
    for name, value in model.unload().state_dict().items():
        assert torch.equal(value.cpu(), before[name])


def test_training_follows_training_with_ordinary_gemms(place, monkeypatch):
    losses = [train_on(place, model_on(place, monkeypatch, gemm)) for gemm in ("fp8", "torch")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0][-1] < losses[0][0]


def train_on(place, model, steps=6):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids, losses = tokens().to(place), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    paca.verify(model)
    return losses


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_recomputed_is_what_was_computed(place, monkeypatch, reentrant):
    """Reentrant checkpointing runs its first forward without gradients."""
    plain = perturb(model_on(place, monkeypatch))
    again = recompute(copy.deepcopy(plain), reentrant).train()
    ids = tokens().to(place)
    losses = []
    for model in (plain, again):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_a_moved_or_copied_layer_has_its_own_copy(place):
    layer = layer_on(place)
    x, gy = torch.randn(3, 48, device=place).bfloat16(), torch.randn(3, 32, device=place).bfloat16()
    expected = step(layer, x, gy)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(step(other, x, gy), expected, strict=True))
    moved = layer.to(torch.float32)
    assert moved.adapted.columns.products.by_rows[0].device.type == place.type
    assert step(moved, x.float(), gy.float())[0].dtype == torch.float32


def test_a_size_that_float8_cannot_take_is_said_and_runs_as_usual(place, caplog):
    with caplog.at_level(logging.WARNING, logger="paca"):
        odd = layer_on(place, n_in=40)
    assert "a layer of 40 inputs and 32 outputs keeps its ordinary GEMMs" in caplog.text
    assert float8_products(torch.zeros(32, 40), torch.tensor([0])) is None
    x, gy = torch.randn(3, 40, device=place).bfloat16(), torch.randn(3, 32, device=place).bfloat16()
    for a, b in zip(step(odd, x, gy), step(layer_on(place, n_in=40, gemm="torch"), x, gy), strict=True):
        assert torch.equal(a, b)


def test_an_empty_batch_is_fine(place):
    y, gx, gdelta = step(
        layer_on(place),
        torch.empty(0, 48, device=place, dtype=torch.bfloat16),
        torch.empty(0, 32, device=place, dtype=torch.bfloat16),
    )
    assert (y.shape, gx.shape) == ((0, 32), (0, 48))
    assert not gdelta.any()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_copy_that_a_compiled_step_saves_is_not_counted_as_kept_by_it(place):
    torch._dynamo.reset()
    layer, x = layer_on(place), torch.randn(4, 48, device=place).bfloat16().requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x)
    columns = layer.adapted.columns
    channels = 4 * 5 * 2
    # The graph may also save the columns' values, which it took from the weight, and their index.
    most = channels + columns.base.nbytes + columns.index.nbytes
    assert channels <= count_kept(lambda: compiled(x), layer, layer).total <= most
    made = sum(tensor.nbytes for tensor in columns.products.tensors)
    assert made == 2 * 48 * 32 + 4 * (48 + 32)


def test_only_the_trained_channels_are_kept(place):
    kept = []
    layer, x = layer_on(place), torch.randn(4, 48, device=place).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[-1], lambda t: t):
        layer(x)
    assert [tuple(t.shape) for t in kept] == [(4, 5)]


def test_a_swapped_weight_is_multiplied_as_it_is(place):
    layer = layer_on(place)
    layer.adapted.residency = "swap"
    layer.adapted.restore()
    assert layer.adapted.step_ops(True) is layer.adapted.ops


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_it_compiles_in_one_graph(place):
    torch._dynamo.reset()
    layer = layer_on(place)
    x, gy = torch.randn(4, 48, device=place).bfloat16(), torch.randn(4, 32, device=place).bfloat16()
    expected = step(layer, x, gy)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x_again = x.clone().requires_grad_()
        layer.paca_delta["default"].grad = None
        y = compiled(x_again)
        y.backward(gy)
        for a, b in zip((y, x_again.grad, layer.paca_delta["default"].grad), expected, strict=True):
            assert torch.allclose(a.float(), b.float(), rtol=2.0**-7, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_compiled_blocks_share_a_graph(place, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(registry, "_current", CUDABackend(gemm="fp8", **PLAIN))
    model = adapted(llama(torch.bfloat16, use_cache=False, num_hidden_layers=3).to(place)).train()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.base_model.model.model.layers:
        block.compile(fullgraph=True, backend=counter)
    losses = train_on(place, model)
    assert losses[-1] < losses[0]
    assert counter.frame_count == 2  # the first block's input needs no gradient


def test_the_choice_is_visible_and_what_excludes_it_is_refused(monkeypatch):
    strategies = CUDABackend(gemm="fp8").strategies
    assert (strategies["gemm"], strategies["shared_input"]) == ("fp8", "alone")
    assert CUDABackend().strategies["gemm"] == "torch"
    with pytest.raises(ValueError, match="cannot go with shared_input='together'"):
        CUDABackend(gemm="fp8", shared_input="together")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(BackendUnavailableError, match=r"capability 8\.9 or newer .*, found 8\.0; leave it out"):
        CUDABackend(gemm="fp8")
    assert CUDABackend().strategies["gemm"] == "torch"


def test_layers_of_a_model_share_nothing_and_all_multiply_in_float8(place, monkeypatch):
    model = model_on(place, monkeypatch)
    assert all(layer.shared_input is None for layer in layers_of(model))
    assert all(layer.adapted.columns.ops is not None for layer in layers_of(model))
