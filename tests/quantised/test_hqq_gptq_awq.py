"""PaCA on layers that HQQ and gptqmodel make: classes of their own, by the libraries themselves, on the CPU.

They run where these libraries are; `make test-quantisers` brings them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

import paca
from paca.layer import PacaLayer

os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # it would compile C++ to pack a few thousand weights

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

IDS = torch.arange(2, 34).reshape(2, 16)
FORMATS = ["hqq", "gptq", "awq"]
SETTINGS = {"bits": 4, "group_size": 32}


def needs(*packages: str) -> None:
    """Skip where a package is missing, and say how to get it."""
    if missing := [package for package in packages if find_spec(package) is None]:
        pytest.skip(f"{', '.join(missing)} not installed; make test-quantisers brings what is needed")


def replaced(base: LlamaForCausalLM, make: Callable[[nn.Linear], nn.Module]) -> LlamaForCausalLM:
    for name, layer in list(base.model.named_modules()):
        if isinstance(layer, nn.Linear):
            base.model.set_submodule(name, make(layer))
    return base


def awq_layer(linear: nn.Linear) -> nn.Module:
    """Round each group of 32 to 16 levels between its extremes."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    groups = linear.weight.detach().reshape(linear.out_features, -1, SETTINGS["group_size"])
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / 15
    layer = AwqTorchLinear(
        **SETTINGS, sym=False, desc_act=False, in_features=linear.in_features, out_features=linear.out_features
    )
    layer.pack(linear, scales, (-low / scales).round())
    layer.post_init()
    return layer


def hqq_layer(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(linear, BaseQuantizeConfig(nbits=4, group_size=32), compute_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def gptq_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, quantised by gptqmodel as transformers does it."""
    needs("gptqmodel", "optimum")
    from transformers import GPTQConfig

    calibration: Any = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    config = GPTQConfig(**SETTINGS, dataset=calibration, tokenizer="none", backend="gptq_torch")
    model = LlamaForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.float32)
    model.config.quantization_config.dataset = None
    folder = tmp_path_factory.mktemp("gptq")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def load(checkpoint: Path, request: pytest.FixtureRequest) -> Callable[..., LlamaForCausalLM]:
    """Load the checkpoint in a format; `how` goes to `from_pretrained`."""

    def load(name: str, dtype: torch.dtype = torch.float32, **how: Any) -> LlamaForCausalLM:
        if name == "gptq":
            folder = request.getfixturevalue("gptq_folder")
            return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **how)
        needs("hqq" if name == "hqq" else "gptqmodel")
        base = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        return replaced(base, hqq_layer if name == "hqq" else awq_layer)

    return load


def adapted(base: nn.Module, **settings: Any) -> Any:
    return peft.get_peft_model(base, paca.PacaConfig(r=4, paca_alpha=8, target_modules="all-linear", **settings))


def layers(model: nn.Module) -> list[PacaLayer]:
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def trained(model: Any, steps: int = 3) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", FORMATS)
def test_all_linear_means_layers_of_the_libraries_own_classes_too(load, name):
    model = adapted(load(name))
    assert len(layers(model)) == 14
    assert {type(layer.get_base_layer()).__module__.partition(".")[0] for layer in layers(model)} <= {
        "hqq",
        "gptqmodel",
    }
    assert {layer.adapted.format for layer in layers(model)} == {name}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_new_adapter_changes_no_bit(load, name, mode):
    base = getattr(load(name), mode)()
    with torch.set_grad_enabled(mode == "train"):
        before = base(input_ids=IDS).logits
        assert torch.equal(adapted(base)(input_ids=IDS).logits, before)


@pytest.mark.parametrize("name", FORMATS)
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(load, name):
    base = load(name).eval()
    with torch.no_grad():
        before = base(input_ids=IDS).logits
    model = adapted(base)
    stored = [layer.adapted.fingerprint(torch.zeros(1)) for layer in layers(model)]
    first = trained(model, 1)
    assert trained(model, 6) < first - 0.1
    assert [layer.adapted.fingerprint(torch.zeros(1)) for layer in layers(model)] == stored
    with torch.no_grad(), model.eval().disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize(("name", "computes"), [("hqq", "float32"), ("gptq", "float32"), ("awq", "float16")])
def test_gradients_meet_the_float64_oracle_on_the_weight_that_the_library_applies(load, name, computes):
    """|error| ≤ γ_n·Σ|terms| per element, with the unit roundoff of the dtype that the library multiplies in."""
    layer = layers(adapted(load(name)).train())[0]
    nn.init.normal_(layer.paca_delta["default"], std=0.1)
    with torch.no_grad():
        weight = layer.get_base_layer()(torch.eye(layer.in_features)).t().double()
    index, scale = layer.paca_indices["default"], layer.scaling["default"]
    weight.index_add_(1, index, scale * layer.paca_delta["default"].detach().double())
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    y = layer(x)
    gy = torch.randn_like(y)
    y.backward(gy)

    unit = torch.finfo(getattr(torch, computes)).eps / 2
    x64, gy64 = x.detach().double().reshape(-1, layer.in_features), gy.double().reshape(-1, layer.out_features)

    def within(found, wanted, terms, n, unit):
        n = n + 3  # the roundings of the operands, the scale and the sum
        return ((found.double() - wanted).abs() <= n * unit / (1 - n * unit) * terms).all()

    assert within(x.grad.reshape_as(x64), gy64 @ weight, gy64.abs() @ weight.abs(), layer.out_features, unit)
    wanted, terms = scale * gy64.t() @ x64[:, index], scale * gy64.abs().t() @ x64[:, index].abs()
    assert within(layer.paca_delta["default"].grad, wanted, terms, len(x64), torch.finfo(torch.float32).eps / 2)


def test_merging_into_hqq_keeps_the_trained_columns_exactly(load):
    model = adapted(load("hqq"))
    trained(model)
    wanted = {}
    for layer in layers(model):
        weight, index = layer.pretrained_weight().clone(), layer.paca_indices["default"]
        weight[:, index] += layer.scaling["default"] * layer.paca_delta["default"].detach()
        wanted[layer.name] = weight
    merged = model.merge_and_unload()
    assert all(torch.equal(merged.get_submodule(name).weight, weight) for name, weight in wanted.items())


def test_requantising_hqq_is_measured_and_warned_about(load):
    model = adapted(load("hqq"))
    trained(model)
    names = {layer.name for layer in layers(model)}
    with pytest.warns(UserWarning, match="re-quantising moved"):
        merged, moved = paca.merge_requantised(model)
    assert set(moved) == names
    assert all(type(merged.get_submodule(name)).__name__ == "HQQLinear" for name in names)
    assert all(0 < layer.mean <= layer.largest for layer in moved.values())


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_what_cannot_be_merged_is_refused_by_its_name_and_serves_as_lora(load, name, tmp_path):
    model = adapted(load(name))
    trained(model)
    with pytest.raises(TypeError, match=rf"{name} weights cannot be dequantised.*convert_to_lora"):
        model.merge_adapter()
    config, tensors = paca.convert_to_lora(model)
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    served = PeftModel.from_pretrained(load(name), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(served(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_adapter_gives_the_same_bits_on_the_same_base_and_is_refused_on_another(load, name, tmp_path):
    model = adapted(load(name))
    trained(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(name), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    other = load(name)
    layer = other.model.layers[0].self_attn.o_proj
    packed = layer.W_q if name == "hqq" else layer.qweight
    packed.data.bitwise_not_()
    with pytest.raises(paca.BaseMismatchError, match=r"layers\.0\.self_attn\.o_proj"):
        PeftModel.from_pretrained(other, str(tmp_path))


def test_hqq_is_recognised_where_it_keeps_zeros_and_scales_together(load):
    """As it does to have them in host memory (`offload_meta`)."""
    model = adapted(load("hqq"))
    (layer, *_), found = layers(model), []
    meta = layer.get_base_layer().meta
    meta["zero_scale"] = torch.stack((meta.pop("zero"), meta.pop("scale")))
    for _ in range(2):
        found.append(layer.fingerprint("default"))
        meta["zero_scale"] *= 2
    assert found[0] != found[1]


def test_a_kernel_that_gives_no_gradient_is_refused_and_one_that_does_trains(load):
    """gptqmodel settles on a kernel at the first use; on a CPU, evaluating in 16 bits makes it one for inference."""
    from transformers import GPTQConfig

    base = load("gptq", torch.bfloat16).eval()
    with torch.no_grad():
        base(input_ids=IDS)
    with pytest.raises(RuntimeError, match=r"gives no gradient.*backend='gptq_torch'"):
        trained(adapted(base))
    base = load("gptq", torch.bfloat16, quantization_config=GPTQConfig(bits=4, backend="gptq_torch")).eval()
    with torch.no_grad():
        base(input_ids=IDS)
    model = adapted(base)
    first = trained(model, 1)
    assert trained(model, 6) < first - 0.1
