"""Rules 2, 3 and 4: columns are written once a step, are never stale, and are undone bit for bit."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import paca
from paca.layer import PacaLayer
from paca.strategies import adapted_columns

TARGETS = ["first", "middle", "last"]
PLAIN_OPTIMIZERS = (
    *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax"),
    *("Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor"),
)


class Net(nn.Module):
    """Three linears with a bend between them.

    `kept`: recompute the middle in backward, by a reentrant checkpoint (True) or the other kind (False).
    """

    def __init__(self, kept=None):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.kept = kept

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.kept is None:
            return self.last(torch.tanh(self.middle(x)))
        return self.last(checkpoint(lambda t: torch.tanh(self.middle(t)), x, use_reentrant=self.kept))


def make_model(kept=None, dtype=torch.float32, **config):
    torch.manual_seed(1)
    base = Net(kept).to(dtype)
    return get_peft_model(base, paca.PacaConfig(r=4, paca_alpha=8, target_modules=TARGETS, **config))


def layers_of(model) -> list[PacaLayer]:
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def deltas_of(model):
    return [layer.paca_delta["default"] for layer in layers_of(model)]


def count_writes(model) -> list[str]:
    """Record the name of every layer whose columns are written from now on."""
    written: list[str] = []
    names = {}
    for layer in layers_of(model):
        names[layer.get_base_layer().weight.data_ptr()] = layer.name
        write = layer.adapted.ops.write_columns

        def record(writes, write=write):
            written.extend(names[w.weight.data_ptr()] for w in writes)
            write(writes)

        layer.adapted.ops = replace(layer.adapted.ops, write_columns=record)
    return written


def assert_fresh(model, x=None):
    """Compare the next forward with that of an independent dense model of W0 + s·Δ, as the deltas are now."""
    x = torch.randn(3, 12, dtype=deltas_of(model)[0].dtype) if x is None else x
    reference = Net().to(x.dtype)
    for layer in layers_of(model):
        weight = layer.pretrained_weight().clone()
        index, delta = layer.paca_indices["default"], layer.paca_delta["default"].detach()
        weight[:, index] = adapted_columns(weight[:, index], delta, layer.scaling["default"])
        target = reference.get_submodule(layer.name)
        target.weight.data.copy_(weight)
        target.bias.data.copy_(layer.get_base_layer().bias)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # reentrant checkpoints complain where there is no gradient
        assert torch.equal(model(x), reference(x))


class FlatCopies(torch.optim.SGD):
    """Steps copies of the parameters and writes them back afterwards, as DeepSpeed's ZeRO-1 and 2 do."""

    def __init__(self, parameters, lr):
        self.model_parameters = list(parameters)
        super().__init__([p.detach().clone() for p in self.model_parameters], lr=lr)

    def flush(self):
        copies = self.param_groups[0]["params"]
        for copied, parameter in zip(copies, self.model_parameters, strict=True):
            copied.grad = parameter.grad.clone()
        self.step()
        for copied, parameter in zip(copies, self.model_parameters, strict=True):
            parameter.data.copy_(copied.data)  # leaves no trace in the version count


def eight_bit(name, parameters):
    """Make a bitsandbytes optimizer that keeps its state in 8 bits and does not raise version counts."""
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)(parameters, lr=0.1, min_8bit_size=0)


def optimizers():
    found = []
    for name in PLAIN_OPTIMIZERS:
        kind = getattr(torch.optim, name)
        found.append(pytest.param(lambda p, kind=kind: kind(p, lr=0.1, foreach=False), id=name))
        if name != "Adafactor":
            found.append(pytest.param(lambda p, kind=kind: kind(p, lr=0.1, foreach=True), id=f"{name}-foreach"))
    for name in ("SGD", "Adam", "AdamW", "Adagrad"):
        kind = getattr(torch.optim, name)
        found.append(pytest.param(lambda p, kind=kind: kind(p, lr=0.1, fused=True), id=f"{name}-fused"))
    missing = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
    pages = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
    found.append(pytest.param(lambda p: eight_bit("AdamW8bit", p), id="AdamW8bit", marks=missing))
    found.append(pytest.param(lambda p: eight_bit("PagedAdamW8bit", p), id="PagedAdamW8bit", marks=[missing, pages]))
    found.append(pytest.param(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), id="LBFGS"))
    found.append(pytest.param(lambda p: FlatCopies(p, lr=0.1), id="flat-copies"))
    return found


def train_step(model, optimizer, accumulate=1):
    def closure():
        optimizer.zero_grad()
        for p in deltas_of(model):
            p.grad = None
        for _ in range(accumulate):
            x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
            loss = model(x).square().mean() / accumulate
            loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
        return
    closure()
    optimizer.flush() if isinstance(optimizer, FlatCopies) else optimizer.step()


@pytest.mark.parametrize("kept", [None, True, False], ids=["plain", "reentrant", "nonreentrant"])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
@pytest.mark.parametrize("make", optimizers())
def test_every_forward_sees_the_last_step(make, accumulate, kept):
    model = make_model(kept)
    optimizer = make(deltas_of(model))
    for step in range(3):
        before = [d.detach().clone() for d in deltas_of(model)]
        train_step(model, optimizer, accumulate)
        assert not torch.equal(before[0], deltas_of(model)[0])
        if step == 1:  # an evaluation in the middle, of odd length
            model.eval()
            assert_fresh(model)
            model.train()
        assert_fresh(model)
        paca.verify(model)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_each_layer_is_written_exactly_once_a_step_and_never_in_forward(accumulate, fused):
    model = make_model()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=fused)
    train_step(model, optimizer)
    written = count_writes(model)
    for step in range(1, 4):
        train_step(model, optimizer, accumulate)
        model(torch.randn(2, 12))
        assert sorted(written) == sorted(["first", "middle", "last"] * step)


def test_columns_are_fresh_even_if_no_hook_of_ours_ran(monkeypatch):
    """Each signal alone: here torch's version count."""
    monkeypatch.setattr("paca.freshness._layers", set())
    model = make_model()
    monkeypatch.setattr("paca.freshness._layers", set())
    optimizer = torch.optim.SGD(deltas_of(model), lr=0.1, foreach=False)
    for _ in range(2):
        train_step(model, optimizer)
        assert_fresh(model)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_changes_nothing(fused):
    model = make_model()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for poison in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(3, 12)).square().mean()).backward()
        if poison:
            deltas_of(model)[0].grad[0, 0] = float("inf")
        before = [d.detach().clone() for d in deltas_of(model)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, deltas_of(model), strict=True))
        assert unchanged == poison
        assert_fresh(model)


def edit_in_place(model):
    with torch.no_grad():
        deltas_of(model)[1].add_(0.5)


def replace_data(model):
    deltas_of(model)[1].data = torch.randn_like(deltas_of(model)[1])


def load(model):
    state = {k: torch.randn_like(v) if "paca_delta" in k else v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def rescale(model):
    layers_of(model)[1].set_scale("default", 3.0)


def scale_and_back(model):
    layer = layers_of(model)[1]
    layer.scale_layer(2.0)
    layer.unscale_layer()
    layer.scale_layer(0.5)


def average_behind_torchs_back(model):
    """Weight averaging: copied through .data, then evaluated."""
    for delta in deltas_of(model):
        delta.data.copy_(torch.randn_like(delta))
    model.train(not model.training)


def refresh(model):
    deltas_of(model)[1].data.add_(1.0)
    paca.refresh(model)


@pytest.mark.parametrize(
    "edit",
    [edit_in_place, replace_data, load, rescale, scale_and_back, average_behind_torchs_back, refresh],
    ids=lambda edit: edit.__name__,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_whatever_changes_a_delta_is_seen(edit, training, residency):
    model = make_model(residency=residency).train(training)
    with torch.no_grad():
        for delta in deltas_of(model):  # or a change of scale would change nothing
            delta.normal_()
    assert_fresh(model)
    edit(model)
    assert_fresh(model)


def test_an_edit_that_leaves_no_trace_is_refused_at_the_next_step():
    model = make_model()
    optimizer = torch.optim.SGD(deltas_of(model), lr=0.1)
    train_step(model, optimizer)
    for delta in deltas_of(model):
        delta.data.add_(1.0)
    with pytest.raises(paca.StaleColumnsError, match=r"does not hold the adapter's columns.*paca\.refresh"):
        train_step(model, optimizer)
    with pytest.raises(paca.StaleColumnsError):
        paca.verify(model)
    paca.refresh(model)
    paca.verify(model)
    train_step(model, optimizer)


def test_each_layer_has_its_turn_in_the_spot_check():
    for broken in range(3):
        model = make_model()
        optimizer = torch.optim.SGD(deltas_of(model), lr=0.1)
        train_step(model, optimizer)
        deltas_of(model)[broken].data.add_(1.0)
        caught = 0
        for _ in range(3):
            try:
                train_step(model, optimizer)
            except paca.StaleColumnsError:
                caught += 1
                break
            deltas_of(model)[broken].data.add_(1.0)
        assert caught == 1


def test_a_foreign_edit_of_the_weight_is_noticed():
    model = make_model()
    layers_of(model)[0].get_base_layer().weight.data.zero_()
    deltas_of(model)[0].data.fill_(0.0)
    with pytest.raises(paca.StaleColumnsError, match="first"):
        paca.verify(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_trains_on_its_own(copied):
    model = make_model()
    train_step(model, torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True))
    twin = copied(model)
    before = [d.detach().clone() for d in deltas_of(model)]
    optimizer = torch.optim.AdamW(deltas_of(twin), lr=0.1, fused=True)
    for _ in range(2):
        train_step(twin, optimizer)
        assert_fresh(twin)
        paca.verify(twin)
    assert all(torch.equal(a, b) for a, b in zip(before, deltas_of(model), strict=True))
    assert_fresh(model)
    paca.verify(model)


def test_two_models_do_not_disturb_each_other():
    one, two = make_model(), make_model()
    written = count_writes(two)
    train_step(one, torch.optim.AdamW(deltas_of(one), lr=0.1, fused=True))
    two(torch.randn(2, 12))
    assert written == []
    assert_fresh(one)
    assert_fresh(two)


def test_inference_mode_first_then_training():
    model = make_model()
    with torch.inference_mode():
        model.set_adapter("default")
        model(torch.randn(2, 12))
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1)
    train_step(model, optimizer)
    assert_fresh(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_undo_restores_the_weight_bit_for_bit(dtype, residency):
    torch.manual_seed(1)
    base = Net().to(dtype)
    pristine = {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(base, paca.PacaConfig(r=4, paca_alpha=8, target_modules=TARGETS, residency=residency))
    for round_ in range(50):  # adding and subtracting a rounded delta drifts after a few rounds
        with torch.no_grad():
            for delta in deltas_of(model):
                delta.copy_(torch.randn_like(delta) * 10.0 ** ((round_ % 7) - 3))
        model(torch.randn(2, 12, dtype=dtype))
        with model.disable_adapter():
            for layer in layers_of(model):
                assert torch.equal(layer.get_base_layer().weight, pristine[f"{layer.name}.weight"])
    state = {k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(state[k], v) for k, v in pristine.items())
    restored = model.unload()
    assert all(torch.equal(v, pristine[k]) for k, v in restored.state_dict().items())


def test_small_updates_of_a_bfloat16_weight_are_not_lost():
    model = make_model(dtype=torch.bfloat16)
    delta = deltas_of(model)[0]
    assert delta.dtype == torch.float32
    optimizer = torch.optim.SGD([delta], lr=1.0)
    for _ in range(200):
        delta.grad = torch.full_like(delta, 1e-5)
        optimizer.step()
    assert torch.allclose(delta, torch.full_like(delta, -200e-5), rtol=1e-3)


def test_weight_decay_pulls_towards_the_pretrained_values():
    model = make_model()
    layer = layers_of(model)[0]
    edit = layer.paca_delta["default"]
    with torch.no_grad():
        edit.fill_(1.0)
    layer.sync()
    optimizer = torch.optim.SGD([edit], lr=0.5, weight_decay=1.0)
    for _ in range(40):
        edit.grad = torch.zeros_like(edit)
        optimizer.step()
    held = layer.get_base_layer().weight
    assert torch.allclose(held, layer.pretrained_weight(), atol=1e-6)
    assert not torch.equal(held, torch.zeros_like(held))


def test_deltas_are_float32_however_the_adapter_is_added():
    model = inject_adapter_in_model(paca.PacaConfig(r=4, target_modules=TARGETS), Net().bfloat16())
    assert {delta.dtype for delta in deltas_of(model)} == {torch.float32}
    explicit = get_peft_model(
        Net().bfloat16(), paca.PacaConfig(r=4, target_modules=TARGETS), autocast_adapter_dtype=False
    )
    assert {delta.dtype for delta in deltas_of(explicit)} == {torch.bfloat16}


def test_two_layers_never_hold_columns_in_one_weight():
    model = make_model()
    first, middle = layers_of(model)[:2]
    middle.get_base_layer().weight.data = first.get_base_layer().weight.data
    with pytest.raises(ValueError, match=r"middle and first share the memory of one weight"):
        model(torch.randn(2, 12))


def test_weights_in_one_memory_are_found_when_the_adapter_is_made():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].weight.data = net[0].weight.data
    model = get_peft_model(net, paca.PacaConfig(r=2, target_modules=["0", "1"]))
    assert [layer.residency for layer in layers_of(model)] == ["swap", "swap"]


def test_base_weights_are_not_loaded_under_a_merged_adapter():
    model = make_model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        model.load_state_dict(state)
    model.unmerge_adapter()
    model.load_state_dict(state)
    assert_fresh(model)


def test_another_models_step_between_forward_and_backward_is_no_reason_to_refuse():
    model, other = make_model(), nn.Linear(2, 2)
    x = torch.randn(2, 12)
    written = count_writes(model)
    loss = model(x).sum()
    other(torch.randn(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    (loss + model(x).sum()).backward()
    assert written == []


def test_a_compiled_model_is_not_trained_on_by_an_optimizer_that_steps_copies():
    model = make_model()
    optimizer = FlatCopies(deltas_of(model), lr=0.1)
    train_step(model, optimizer)
    for layer in layers_of(model):
        layer.sync = lambda adapters: None  # a compiled forward does not look
    with pytest.raises(paca.StaleColumnsError, match="steps copies while the model runs compiled"):
        train_step(model, optimizer)


def test_a_fused_step_between_forward_and_backward_is_refused():
    model = make_model()
    loss = model(torch.randn(2, 12)).sum()
    train_step(model, torch.optim.SGD(deltas_of(model), lr=0.1, fused=True))
    with pytest.raises(paca.StaleColumnsError, match="changed between forward and backward"):
        loss.backward()


def test_adapters_of_different_dtype_add_up():
    model = make_model(dtype=torch.bfloat16)
    model.add_adapter("low", paca.PacaConfig(r=4, target_modules=TARGETS), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "low"])
    model(torch.randn(2, 12, dtype=torch.bfloat16)).sum().backward()
    model.base_model.add_weighted_adapter(["low", "default"], [1.0, 1.0], "sum")


def test_a_base_layer_that_is_cast_alone_keeps_working():
    model = make_model()
    with torch.no_grad():
        for delta in deltas_of(model):
            delta.normal_()
    model(torch.randn(2, 12))
    for layer in layers_of(model):
        layer.get_base_layer().to(torch.bfloat16)
    x = torch.randn(2, 12, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    paca.verify(model)


def test_a_config_object_can_be_used_again_after_a_save(tmp_path):
    config = paca.PacaConfig(r=4, target_modules=TARGETS)
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    again = get_peft_model(Net(), config)
    again.load_state_dict(again.state_dict())
