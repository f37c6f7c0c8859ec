"""What the CUDA backend says of the machine, and that its strategies train a layer as the CPU's do."""

from __future__ import annotations

import copy

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel
from torch import nn

import paca
from paca import registry
from paca.errors import BackendUnavailableError
from paca.layer import PacaLayer
from paca.strategies import ColumnWrite, write_index_copy
from paca_cuda import CUDABackend, ops
from paca_cuda.strategies import write_multi_tensor


def test_it_is_known_and_says_why_it_cannot_be_used():
    why = paca.available_backends()["cuda"]
    if torch.cuda.is_available():
        assert why is None
    elif torch.version.cuda is None:
        assert why is not None
        assert "built without CUDA; install a CUDA build" in why
    else:
        assert why is not None
        assert "sees no CUDA device" in why


def test_a_machine_whose_devices_are_hidden_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES='7'" in str(CUDABackend.why_unavailable())


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert CUDABackend.why_unavailable() == "it needs torch 2.10 or newer, found 2.9.1+cu128"


def test_without_triton_the_defaults_do_without_it_and_a_wish_is_refused(monkeypatch):
    monkeypatch.setattr("paca_cuda.why_no_triton", lambda: "Triton is not installed: pip install triton")
    assert CUDABackend().ops.write_columns is write_index_copy
    assert CUDABackend(write="index_put").strategies["write"] == "index_put"
    for wish in ({"gather": "triton"}, {"grad_columns": "triton"}, {"write": "multi_tensor"}):
        with pytest.raises(BackendUnavailableError, match="Triton is not installed"):
            CUDABackend(**wish)


def test_without_triton_tuned_means_cublas(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the operator run on the CPU
    monkeypatch.setattr(ops, "why_no_triton", lambda: "not installed")
    gy, xs = torch.randn(5, 4), torch.randn(5, 3)
    assert torch.equal(CUDABackend().ops.grad_columns(gy, xs, 1.0), gy.t() @ xs)


def test_a_model_that_stays_on_the_cpu_trains_and_switches_as_by_torchs_operations(monkeypatch):
    """Or those of its layers that do: the device's backend is the default where there is a device."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in ("paca_cuda", "paca_cuda.ops"):
        monkeypatch.setattr(f"{module}.why_no_triton", lambda: None)  # no kernel is needed
    found = []
    for strategies in (
        {"gather": "triton", "grad_columns": "triton", "write": "multi_tensor"},
        {"gather": "index_select", "grad_columns": "cublas", "write": "index_copy"},
    ):
        monkeypatch.setattr(registry, "_current", CUDABackend(**strategies))
        model = tiny.adapted(tiny.llama())
        model.add_adapter("other", tiny.config(paca_alpha=4))
        tiny.perturb(model, "other")
        losses = tiny.train(model)
        for name in ("other", "default"):
            model.set_adapter(name)
            losses.append(tiny.logits(model))
        found.append(losses)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*found, strict=True))
    assert found[0][2] < found[0][0]


def test_a_bank_gives_the_pretrained_weights_back_with_nothing_new_to_write(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("paca_cuda.why_no_triton", lambda: None)
    monkeypatch.setattr(registry, "_current", CUDABackend(write="multi_tensor"))
    tiny.perturb(tiny.adapted(tiny.llama())).save_pretrained(tmp_path)
    base = tiny.llama()
    bank = paca.AdapterBank(base)
    bank.load("one", tmp_path)
    bank.swap("one")
    assert not tiny.same_bits(dict(base.state_dict()), tiny.llama().state_dict())
    bank.swap(None)
    assert tiny.same_bits(dict(base.state_dict()), tiny.llama().state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: there is no second device")
@pytest.mark.parametrize("to", ["cpu", "cuda"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_that_is_read_to_another_device_ends_beside_its_base(tmp_path, to, low_cpu_mem_usage):
    """PEFT reads it to the GPU, wherever the base is."""
    tiny.perturb(tiny.adapted(tiny.llama())).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.llama().to(to), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {to}
    same = tiny.perturb(tiny.adapted(tiny.llama())).to(to)
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=tiny.tokens().to(to)).logits for m in (model, same))
    assert torch.equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: there is no second device")
def test_weights_on_both_devices_are_written_in_one_call():
    weights = [torch.zeros(8, 6, device=where) for where in ("cpu", "cuda", "cpu", "cuda")]
    write_multi_tensor(
        [
            ColumnWrite(weight, torch.tensor([1, 4], device=weight.device), weight[:, :2] + 1, weight[:, :2] + 2, 0.5)
            for weight in weights
        ]
    )
    assert all(weight.sum() == 8 * 2 * 2 for weight in weights)


@pytest.mark.parametrize(("major", "bf16"), [(7, False), (8, True), (9, True), (10, True)])
def test_bfloat16_needs_ampere(monkeypatch, major, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    backend = CUDABackend()
    assert (torch.bfloat16 in backend.capabilities.dtypes) == bf16
    assert backend.autocast_dtype() == (torch.bfloat16 if bf16 else torch.float16)


def test_the_device_is_described(gpu):
    backend = paca.set_backend("cuda")
    assert backend.device().type == "cuda"
    assert torch.cuda.get_device_name() in backend.describe()
    backend.reset_peak_memory()
    before = backend.memory()
    held = torch.empty(2**20, dtype=torch.uint8, device=gpu)
    backend.synchronize()
    after = backend.memory()
    assert after.allocated - before.allocated == held.numel()
    assert before.allocated < after.allocated <= after.peak <= after.limit


def integers(*shape, generator):
    """Small whole numbers, so that all sums are exact in every order."""
    return torch.randint(-2, 3, shape, generator=generator).float() * (torch.rand(shape, generator=generator) < 0.3)


def two_steps(backend, device, dtype, autocast=False):
    """Train two layers that share an input for two exact steps; return all that came of it."""
    generator = torch.Generator().manual_seed(0)
    layers, r = [], 5
    for n_out in (24, 70):
        base = nn.Linear(40, n_out).requires_grad_(False)
        base.weight.copy_(integers(n_out, 40, generator=generator))
        base.bias.copy_(integers(n_out, generator=generator))
        layer = PacaLayer(base.to(device, dtype), f"layer{n_out}", backend)
        layer.update_layer("default", torch.tensor([1, 4, 7, 20, 39]), alpha=2 * r)
        layers.append(layer)
    deltas = [layer.paca_delta["default"] for layer in layers]
    optimizer = torch.optim.SGD(deltas, lr=0.5)
    found = []
    for _ in range(2):
        x = integers(2, 12, 40, generator=generator).to(device, dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            ys = [layer(x) for layer in layers]
        torch.autograd.backward(ys, [integers(*y.shape, generator=generator).to(device, y.dtype) for y in ys])
        found += [*ys, x.grad, *(delta.grad.clone() for delta in deltas)]
        optimizer.step()
        optimizer.zero_grad()
        found += [copy.deepcopy(layer.get_base_layer().weight.detach()) for layer in layers]
    return [tensor.detach().cpu() for tensor in found]


@pytest.mark.parametrize("gather", ["index_select", "triton"])
@pytest.mark.parametrize("grad_columns", ["tuned", "triton", "cublas"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
@torch.no_grad()
def test_two_exact_steps_have_the_bits_of_the_cpu(device, gather, grad_columns, dtype, autocast):
    with torch.enable_grad():
        expected = two_steps(paca.set_backend("cpu"), torch.device("cpu"), dtype, autocast)
        backend = CUDABackend(gather=gather, grad_columns=grad_columns)
        assert backend.ops.write_columns is write_multi_tensor
        found = two_steps(backend, device, dtype, autocast)
    for made, wanted in zip(found, expected, strict=True):
        assert made.dtype == wanted.dtype
        assert torch.equal(made, wanted)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_layer_with_the_kernels_compiles_in_one_graph(device):
    torch._dynamo.reset()
    backend = CUDABackend(gather="triton", grad_columns="triton")
    base = nn.Linear(20, 16).requires_grad_(False).to(device)
    layer = PacaLayer(base, "layer", backend)
    layer.update_layer("default", torch.tensor([1, 4, 7]), alpha=6)
    x = torch.randn(2, 5, 20, device=device)
    gy = torch.randn(2, 5, 16, device=device)
    delta = layer.paca_delta["default"]
    layer(x).backward(gy)
    expected, delta.grad = delta.grad, None
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).backward(gy)
    assert torch.allclose(delta.grad, expected, rtol=1e-5, atol=1e-6)
