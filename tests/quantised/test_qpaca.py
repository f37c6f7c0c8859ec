"""PaCA on quantised bases: the same method, with a weight that is never written."""

from __future__ import annotations

import copy
import gc
import math
import operator
from contextlib import nullcontext

import peft
import pytest
import torch
from formats import FORMATS
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import CHECKPOINTING
from torch import nn
from transformers import LlamaForCausalLM

import paca
from paca.layer import PacaLayer
from paca.merging import merge
from paca.quantised import QuantisedWeight, library_of
from paca.strategies import OVERLAY_FROM_TOKENS

IDS = torch.arange(2, 34).reshape(2, 16)


def adapted(base, r=4, **settings):
    return peft.get_peft_model(base, paca.PacaConfig(r=r, paca_alpha=2 * r, target_modules="all-linear", **settings))


def layers(model):
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


@torch.enable_grad()
def trained(model, steps=3, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def dense_twin(model):
    """The same model in ordinary layers, as it is now."""
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("tokens", [IDS.numel(), OVERLAY_FROM_TOKENS])
def test_a_new_adapter_changes_no_bit(quantised, name, mode, tokens):
    base, ids = quantised(name), IDS.repeat(tokens // IDS.numel(), 1)
    getattr(base, mode)()
    with torch.set_grad_enabled(mode == "train"):
        before = base(input_ids=ids).logits
        after = adapted(base)(input_ids=ids).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", FORMATS)
def test_every_targeted_layer_is_adapted_and_its_stored_weight_never_written(quantised, name):
    base = quantised(name)
    model = adapted(base)
    before = [layer.adapted.fingerprint(torch.zeros(1)) for layer in layers(model)]
    first = trained(model, steps=1)
    assert trained(model, steps=6) < first - 0.1
    assert len(before) == 14
    assert [layer.adapted.fingerprint(torch.zeros(1)) for layer in layers(model)] == before
    assert {layer.residency for layer in layers(model)} == {"quantised"}


@pytest.mark.parametrize("name", FORMATS)
def test_switching_off_gives_the_base_s_own_bits(quantised, name):
    base = quantised(name).eval()
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        model = adapted(base)
        trained(model.train())
        model.eval()
        assert not torch.equal(model(input_ids=IDS).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, before)
        assert torch.equal(model.unload()(input_ids=IDS).logits, before)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize(("tokens", "form"), [(OVERLAY_FROM_TOKENS - 1, "split"), (OVERLAY_FROM_TOKENS, "overlay")])
def test_the_fastest_form_follows_the_tokens_and_has_that_form_s_bits(quantised, name, tokens, form, trains):
    found = {}
    for choice in ("fastest", "overlay", "split"):
        with paca.use_backend("cpu", quantised=choice):
            layer = layers(adapted(quantised(name)))[0].train(trains)
        delta = layer.paca_delta["default"]
        x = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_(trains)
        nn.init.normal_(delta, std=0.1, generator=torch.Generator().manual_seed(1))
        with torch.set_grad_enabled(trains):
            y = layer(x)
        found[choice] = [y]
        if trains:
            y.square().sum().backward()
            found[choice] += [x.grad, delta.grad]
    other = "overlay" if form == "split" else "split"
    assert all(torch.equal(mine, its) for mine, its in zip(found["fastest"], found[form], strict=True))
    assert not torch.equal(found["fastest"][0], found[other][0])


def test_the_tokens_of_a_batch_are_counted_over_all_its_rows(quantised):
    with paca.use_backend("cpu", quantised="fastest"):
        layer = layers(adapted(quantised("nf4")))[0]
    seen = []
    layer.get_base_layer().register_forward_hook(lambda *_: seen.append("split"))
    layer(torch.randn(2, OVERLAY_FROM_TOKENS // 2, layer.in_features))
    assert seen == []
    layer(torch.randn(1, OVERLAY_FROM_TOKENS // 2, layer.in_features))
    assert seen == ["split"]


@pytest.mark.parametrize("form", ["overlay", "split"])
@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8", "torchao-int4"])
def test_gradients_meet_the_float64_oracle_on_the_dequantised_weight(quantised, name, form):
    """|error| ≤ γ_n·Σ|terms| per element (Higham, Accuracy and Stability, §3.5), n = the number of terms."""
    with paca.use_backend("cpu", quantised=form):
        model = adapted(quantised(name))
    layer = layers(model)[0]
    nn.init.normal_(layer.paca_delta["default"], std=0.1)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    y = layer(x)
    gy = torch.randn_like(y)
    y.backward(gy)

    index, scale = layer.paca_indices["default"], layer.scaling["default"]
    weight, delta = layer.pretrained_weight().double(), layer.paca_delta["default"].detach().double()
    weight.index_add_(1, index, scale * delta)
    x64, gy64 = x.detach().double().reshape(-1, x.shape[-1]), gy.double().reshape(-1, gy.shape[-1])
    unit = torch.finfo(torch.float32).eps / 2

    def within(found, wanted, terms, n):
        n = n + 3  # the roundings of the adapted weight, the scale and the update
        return ((found.double() - wanted).abs() <= n * unit / (1 - n * unit) * terms).all()

    assert within(x.grad.reshape_as(x64), gy64 @ weight, gy64.abs() @ weight.abs(), layer.out_features)
    gdelta = layer.paca_delta["default"].grad
    wanted, terms = scale * gy64.t() @ x64[:, index], scale * gy64.abs().t() @ x64[:, index].abs()
    assert within(gdelta, wanted, terms, len(x64))
    if form == "overlay":
        assert within(y.detach().reshape_as(gy64), x64 @ weight.t(), x64.abs() @ weight.abs().t(), layer.in_features)


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8", "torchao-int4"])
@pytest.mark.parametrize("form", ["exact", "overlay", "split", "fastest"])
def test_only_r_channels_are_kept_for_backward(quantised, name, form):
    """LoRA keeps the whole input; so does bitsandbytes' own int8 product."""
    with paca.use_backend("cpu", quantised=form):
        model = adapted(quantised(name))
    layer = layers(model)[0]
    x = torch.randn(2, 8, layer.in_features, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (layer.paca_delta["default"], layer.adapted.chosen.index)}
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    assert sum(size for address, size in kept.items() if address not in own) == 2 * 8 * 4 * x.element_size()
    assert y.requires_grad


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
def test_no_dequantised_weight_outlives_its_product(quantised, name):
    model = adapted(quantised(name))
    before = live_tensors()
    y = model(input_ids=IDS).logits
    gc.collect()
    sizes = {(layer.out_features, layer.in_features) for layer in layers(model)}
    left = {number: shape for number, shape in live_tensors().items() if number not in before and shape in sizes}
    assert left == {}
    assert y.requires_grad


def live_tensors():
    """The shapes of all floating-point tensors that Python knows, by id."""
    tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
    return {id(tensor): tuple(tensor.shape) for tensor in tensors if tensor.dtype == torch.float32}


@pytest.mark.parametrize("name", FORMATS)
def test_merging_keeps_the_trained_columns_exactly(quantised, name):
    model = adapted(quantised(name))
    trained(model)
    wanted = {}
    for layer in layers(model):
        weight, index = layer.pretrained_weight().clone(), layer.paca_indices["default"]
        weight[:, index] += layer.scaling["default"] * layer.paca_delta["default"].detach()
        wanted[layer.name] = weight
    merged = model.merge_and_unload()
    for path, weight in wanted.items():
        found = merged.get_submodule(path)
        assert type(found) is nn.Linear
        assert torch.equal(found.weight, weight)


def test_a_merged_model_is_saved_as_an_ordinary_one(quantised, tmp_path):
    model = adapted(quantised("nf4"))
    trained(model)
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, merged(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
def test_unmerging_gives_the_quantised_layer_back(quantised, name):
    model = adapted(quantised(name))
    trained(model)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        model.merge_adapter()
        assert torch.allclose(model(input_ids=IDS).logits, before, atol=2e-2)
        assert not any(library_of(layer.get_base_layer()) for layer in layers(model))
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_several_adapters_add_up(quantised):
    model = adapted(quantised("nf4"), r=4)
    model.add_adapter("second", paca.PacaConfig(r=6, paca_alpha=6, target_modules="all-linear", random_seed=7))
    for layer in layers(model):
        for delta in layer.paca_delta.values():
            nn.init.normal_(delta, std=0.05)
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, dense_twin(model)(input_ids=IDS).logits, atol=1e-5)


def test_a_saved_adapter_gives_the_same_bits_on_the_same_base(quantised, tmp_path):
    model = adapted(quantised("nf4"))
    trained(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised("nf4"), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("name", "why"), [("fp4", "was nf4, this one is fp4"), ("nf4-double", "differ"), ("int8", "int8")]
)
def test_a_base_quantised_otherwise_is_refused(quantised, tmp_path, name, why):
    model = adapted(quantised("nf4"))
    trained(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(paca.BaseMismatchError, match=why):
        PeftModel.from_pretrained(quantised(name), str(tmp_path))


def test_a_base_that_is_not_quantised_is_refused_unless_one_means_it(quantised, checkpoint, tmp_path):
    adapted(quantised("nf4")).save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(paca.BaseMismatchError, match="was nf4, this one is not quantised"):
        PeftModel.from_pretrained(plain, str(tmp_path))
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    config.check_base = False
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(checkpoint), str(tmp_path), config=config)


def test_a_corrupted_base_is_refused(quantised, tmp_path):
    adapted(quantised("nf4")).save_pretrained(tmp_path)
    base = quantised("nf4")
    weight = base.model.layers[1].mlp.down_proj.weight
    weight.data.copy_(((weight.data & 15) << 4) | (weight.data >> 4))  # nibbles swapped, as between library versions
    with pytest.raises(paca.BaseMismatchError, match=r"layers\.1\.mlp\.down_proj"):
        PeftModel.from_pretrained(base, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nf4", "quant_state.absmax"),
        ("nf4-double", "quant_state.absmax"),
        ("nf4-double", "quant_state.offset"),
        ("nf4-double", "quant_state.state2.absmax"),
        ("nf4-double", "quant_state.state2.code"),
        ("int8", "SCB"),
        ("torchao-int8", "scale"),
        ("torchao-float8", "scale"),
    ],
)
def test_a_base_whose_scales_were_corrupted_is_refused(quantised, tmp_path, name, part):
    adapted(quantised(name)).save_pretrained(tmp_path)
    base = quantised(name)
    weight = base.model.layers[1].mlp.down_proj.weight
    operator.attrgetter(part)(weight).zero_()
    with pytest.raises(paca.BaseMismatchError, match=r"layers\.1\.mlp\.down_proj"):
        PeftModel.from_pretrained(base, str(tmp_path))


def test_residency_cannot_be_asked_of_a_quantised_weight(quantised):
    with pytest.raises(ValueError, match="quantised"):
        adapted(quantised("nf4"), residency="resident")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit"])
def test_optimizers_of_bitsandbytes_train_the_columns_that_are_used(quantised, optimizer):
    model = adapted(quantised("nf4"))
    import bitsandbytes

    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = getattr(bitsandbytes.optim, optimizer)(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            twin = dense_twin(model)
            assert torch.allclose(model(input_ids=IDS).logits, twin(input_ids=IDS).logits, atol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
def test_a_batch_can_mix_adapters(quantised, name):
    model = adapted(quantised(name))
    model.add_adapter("second", paca.PacaConfig(r=6, paca_alpha=6, target_modules="all-linear", random_seed=7))
    for layer in layers(model):
        for delta in layer.paca_delta.values():
            nn.init.normal_(delta, std=0.05)
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["second", "default"]).logits
        for row, adapter in enumerate(["second", "default"]):
            model.set_adapter(adapter)
            assert torch.allclose(mixed[row], model(input_ids=IDS).logits[row], atol=1e-5)


class Sealed(nn.Module):
    """A linear layer of a library that gives its weight to nobody."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.bias = None

    def forward(self, x):
        return x @ self.qweight.t()


@pytest.fixture
def sealed_model(monkeypatch):
    """Two layers of a forward-only format, as GPTQ's and AWQ's are to PEFT."""
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    library = ForwardOnlyQuantizationBackend("gptq")
    resolve = paca.quantised.resolve_quantization_backend
    monkeypatch.setattr(
        paca.quantised,
        "resolve_quantization_backend",
        lambda layer, **known: library if isinstance(layer, Sealed) else resolve(layer, **known),
    )
    return nn.Sequential(Sealed(nn.Linear(12, 16, bias=False)), nn.Tanh(), Sealed(nn.Linear(16, 8, bias=False)))


def test_a_forward_only_format_trains_by_the_split_form(sealed_model):
    twin = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))
    for mine, theirs in ((twin[0], sealed_model[0]), (twin[2], sealed_model[2])):
        mine.weight.data.copy_(theirs.qweight)
    config = {"r": 3, "paca_alpha": 6, "target_modules": ["0", "2"]}
    models = [peft.get_peft_model(base, paca.PacaConfig(**config)) for base in (sealed_model, twin)]
    x = torch.randn(5, 12)
    for model in models:
        inputs = x.clone().requires_grad_(True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.seen = inputs.grad
    split, plain = models
    assert torch.allclose(split.seen, plain.seen, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(layers(split), layers(plain), strict=True):
        assert torch.allclose(mine.paca_delta["default"], theirs.paca_delta["default"], rtol=1e-4, atol=1e-6)


def test_merging_into_a_forward_only_format_is_refused_with_what_to_do(sealed_model):
    model = peft.get_peft_model(sealed_model, paca.PacaConfig(r=3, target_modules=["0", "2"]))
    x = torch.randn(5, 12)
    for layer in layers(model):
        nn.init.normal_(layer.paca_delta["default"])
    before = model(x)
    with pytest.raises(TypeError, match=r"gptq weights cannot be dequantised.*convert_to_lora"):
        model.merge_adapter()
    with pytest.raises(TypeError, match=r"gptq weights cannot be dequantised"):
        layers(model)[0].merge()
    assert torch.equal(model(x), before)


def test_a_merge_that_one_layer_cannot_do_changes_none(sealed_model):
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 12), sealed_model[0]), paca.PacaConfig(r=3, target_modules=["0", "1"])
    )
    with pytest.raises(TypeError, match=r"1: gptq weights cannot be dequantised"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers(model))


@pytest.mark.parametrize("name", FORMATS)
def test_requantising_is_measured_and_warned_about(quantised, name):
    model = adapted(quantised(name))
    trained(model)
    names = {layer.name for layer in layers(model)}
    with pytest.warns(UserWarning, match="re-quantising moved"):
        merged, moved = paca.merge_requantised(model)
    assert set(moved) == names
    assert all(0 < layer.mean <= layer.largest and layer.of_update > 0 for layer in moved.values())
    assert all(library_of(merged.get_submodule(name)) is not None for name in names)
    assert merged.config.quantization_config is not None


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
def test_requantising_leaves_layers_alone_that_only_another_adapter_trains(quantised, name):
    base = quantised(name)
    model = peft.get_peft_model(base, paca.PacaConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("second", paca.PacaConfig(r=4, target_modules=["v_proj"]))
    model.set_adapter("second")
    trained(model)
    model.set_adapter("default")
    trained(model)
    untouched = base.model.layers[0].self_attn.v_proj.get_base_layer()
    with pytest.warns(UserWarning, match="re-quantising moved"):
        merged, moved = paca.merge_requantised(model)
    assert {name.rpartition(".")[2] for name in moved} == {"q_proj"}
    assert merged.model.layers[0].self_attn.v_proj is untouched
    assert merged(input_ids=IDS).logits.isfinite().all()


def test_requantising_is_refused_where_the_active_adapter_trains_no_quantised_layer(quantised):
    model = peft.get_peft_model(quantised("nf4"), paca.PacaConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("head", paca.PacaConfig(r=4, target_modules=["lm_head"]))
    model.set_adapter("head")
    with pytest.raises(ValueError, match="no layer of the active adapters is quantised"):
        paca.merge_requantised(model)
    assert len(layers(model)) == 3


def test_requantising_needs_no_transformers_model():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = [bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2)]
    model = peft.get_peft_model(
        nn.Sequential(made[0], nn.Tanh(), made[1]).to("cpu"), paca.PacaConfig(r=4, target_modules=["0", "2"])
    )
    for layer in layers(model):
        nn.init.normal_(layer.paca_delta["default"], std=0.05)
    with pytest.warns(UserWarning, match="re-quantising moved"):
        merged, moved = paca.merge_requantised(model)
    assert set(moved) == {"0", "2"}
    assert library_of(merged[0]) is not None


def test_requantising_an_untrained_adapter_moves_more_than_nothing(quantised):
    with pytest.warns(UserWarning, match="by inf% "):
        _, moved = paca.merge_requantised(adapted(quantised("nf4")))
    assert {layer.of_update for layer in moved.values()} == {math.inf}


def test_requantising_what_does_not_tell_its_settings_is_refused_before_anything_is_taken_apart(quantised):
    model = adapted(quantised("torchao-int8"))
    del model.get_base_model().hf_quantizer
    with pytest.raises(ValueError, match=r"torchao, which does not record how.*merge_and_unload"):
        paca.merge_requantised(model)
    assert len(layers(model)) == 14


def test_a_quantised_weight_survives_deepcopy_and_state_dict(quantised):
    model = adapted(quantised("nf4"))
    trained(model)
    twin = copy.deepcopy(model)
    assert all(isinstance(layer.adapted, QuantisedWeight) for layer in layers(twin))
    with torch.no_grad():
        assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
def test_columns_can_start_from_the_checkpoint_s_own_values(quantised, checkpoint, name):
    original = load_file(checkpoint / "model.safetensors")
    model = adapted(quantised(name), start_from="checkpoint")
    for layer in layers(model):
        index = layer.paca_indices["default"]
        assert not torch.equal(layer.base_columns("default"), original[f"{layer.name}.weight"][:, index])
    merged = model.merge_and_unload()
    for layer in layers(adapted(quantised(name))):  # the same columns: they depend on seed and name alone
        index = layer.paca_indices["default"]
        found = merged.get_submodule(layer.name).weight
        assert torch.allclose(found[:, index], original[f"{layer.name}.weight"][:, index], atol=0, rtol=1e-6)


def test_starting_from_a_checkpoint_that_is_not_there_says_so(quantised):
    base = quantised("nf4")
    base.config._name_or_path = base.name_or_path = ""
    with pytest.raises(ValueError, match=r"start_from='checkpoint'.*use start_from='loaded'"):
        adapted(base, start_from="checkpoint")


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("tokens", [IDS.numel(), OVERLAY_FROM_TOKENS])
def test_gradient_checkpointing_changes_no_gradient(quantised, name, reentrant, tokens):
    gradients, ids = [], IDS.repeat(tokens // IDS.numel(), 1)
    for checkpointing in (False, True):
        model = adapted(quantised(name)).train()
        for layer in layers(model):
            nn.init.normal_(layer.paca_delta["default"], std=0.05, generator=torch.Generator().manual_seed(0))
        if checkpointing:
            enable = getattr(model.get_base_model(), f"{CHECKPOINTING}_enable")
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([layer.paca_delta["default"].grad for layer in layers(model)])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


# torchao's packed int4 takes inputs of the dtype that was quantised only, with or without an adapter
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "torchao-int4"])
def test_autocast_keeps_identity_and_trains(quantised, name):
    base = quantised(name)
    with torch.autocast("cpu", torch.bfloat16):
        before = base(input_ids=IDS).logits
        model = adapted(base)
        after = model(input_ids=IDS, labels=IDS)
    assert torch.equal(before, after.logits)
    after.loss.backward()
    assert all(layer.paca_delta["default"].grad.abs().sum() > 0 for layer in layers(model))


class NoTokenizer:
    """Saves nothing."""

    def save_pretrained(self, folder):
        pass


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8", "torchao-float8"])
def test_a_merged_folder_loads_without_paca(quantised, tmp_path, requantize, name):
    """Layers without an adapter come along: dequantised with the rest, or as they were."""
    base = quantised(name)
    model = peft.get_peft_model(base, paca.PacaConfig(r=4, target_modules=["q_proj"]))
    trained(model)
    with pytest.warns(UserWarning, match="re-quantising moved") if requantize else nullcontext():
        merge(model, NoTokenizer(), tmp_path / "merged", requantize=requantize)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert (library_of(loaded.model.layers[0].mlp.up_proj) is not None) == requantize
    assert (library_of(loaded.model.layers[0].self_attn.q_proj) is not None) == requantize
    assert hasattr(loaded.config, "quantization_config") == requantize
