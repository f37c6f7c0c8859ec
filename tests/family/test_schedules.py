"""Columns that change from step to step: prefixes, groups, new choices, layers that drop out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

import paca
from paca.errors import AdapterError, BaseMismatchError, OptimizerError
from paca.schedule import Groups, Prefixes, go_to, state_of, steps_an_epoch

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
}
PREFIX = {"prefix_training": {"min": 1, "max": 6}, "r": 6}


def deltas(model: Any) -> dict[str, torch.Tensor]:
    return {layer.name: layer.paca_delta["default"].detach().clone() for layer in tiny.layers_of(model)}


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int = 5) -> float:
    model.train()
    loss = model(input_ids=tiny.tokens(seed=seed), labels=tiny.tokens(seed=seed)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def parameters(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def schedule_of(model: Any) -> Any:
    [schedule] = {id(s): s for layer in tiny.layers_of(model) for s in layer.schedules}.values()
    return schedule


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request: pytest.FixtureRequest) -> Any:
    return OPTIMIZERS[request.param]


# ------------------------------------------------------------------------------------------ prefixes


def test_a_step_runs_with_a_prefix_and_moves_nothing_else(make_optimizer: Any) -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(), **PREFIX))
    optimizer = make_optimizer(parameters(model))
    seen = set()
    for _ in range(12):
        count = schedule_of(model).part(6)[1]
        seen.add(count)
        before = deltas(model)
        columns = {layer.name: layer.paca_indices["default"][:count].tolist() for layer in tiny.layers_of(model)}
        cut = tiny.adapted(tiny.llama(), columns=columns, alpha_pattern=dict.fromkeys(columns, 8 * count / 6))
        with torch.no_grad():
            for layer in tiny.layers_of(cut):
                layer.paca_delta["default"].copy_(before[layer.name][:, :count])
        paca.refresh(cut)
        torch.testing.assert_close(tiny.logits(model, training=True), tiny.logits(cut, training=True))
        step(model, optimizer)
        for name, delta in deltas(model).items():
            assert torch.equal(delta[:, count:], before[name][:, count:])
            assert not torch.equal(delta[:, :count], before[name][:, :count])
        paca.verify(model)
    assert len(seen) > 3


def test_evaluation_runs_with_all_columns() -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(), **PREFIX))
    plain = tiny.perturb(tiny.adapted(tiny.llama(), r=6))
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    assert not torch.equal(tiny.logits(model, training=True), tiny.logits(plain, training=True))
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


def test_any_prefix_is_exported(tmp_path: Path) -> None:
    from paca.cli import main

    model = tiny.perturb(tiny.adapted(tiny.llama(), **PREFIX)).eval()
    model.save_pretrained(tmp_path / "all")
    for count in (1, 4):
        out = tmp_path / str(count)
        assert main(["export", str(tmp_path / "all"), "--to", "prefix", "--r", str(count), "--out", str(out)]) == 0
        cut = PeftModel.from_pretrained(tiny.llama(), out)
        for layer, whole in zip(tiny.layers_of(cut), tiny.layers_of(model), strict=True):
            assert torch.equal(layer.paca_delta["default"], whole.paca_delta["default"][:, :count])
            assert layer.scaling["default"] == whole.scaling["default"]
    assert main(["export", str(tmp_path / "all"), "--to", "prefix", "--r", "9", "--out", str(tmp_path / "x")]) == 2


# ------------------------------------------------------------------------------------------ groups


def test_one_group_trains_in_each_step_and_every_group_has_its_turn(make_optimizer: Any) -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(), r=6, groups=3))
    optimizer = make_optimizer(parameters(model))
    for _ in range(2):
        turns = set()
        for _ in range(3):
            first, end = schedule_of(model).part(6)
            turns.add((first, end))
            before, moments = deltas(model), {}
            for layer in tiny.layers_of(model):
                moments[layer.name] = [t.clone() for t in state_of(optimizer, layer.paca_delta["default"])]
            step(model, optimizer)
            paca.verify(model)
            for layer in tiny.layers_of(model):
                delta, was = layer.paca_delta["default"].detach(), before[layer.name]
                assert not torch.equal(delta[:, first:end], was[:, first:end])
                rest = [c for c in range(6) if not first <= c < end]
                assert torch.equal(delta[:, rest], was[:, rest])
                for now, then in zip(
                    state_of(optimizer, layer.paca_delta["default"]), moments[layer.name], strict=False
                ):
                    assert torch.equal(now[:, rest], then[:, rest])
        assert turns == {(0, 2), (2, 4), (4, 6)}


def test_a_group_gets_the_gradient_that_it_gets_when_all_train_and_all_are_in_the_forward() -> None:
    grouped, plain = (tiny.perturb(tiny.adapted(tiny.llama(), r=6, groups=g)).train() for g in (2, None))
    first, end = schedule_of(grouped).part(6)
    for model in (grouped, plain):
        model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert torch.equal(tiny.logits(grouped, training=True), tiny.logits(plain, training=True))
    for ours, theirs in zip(tiny.layers_of(grouped), tiny.layers_of(plain), strict=True):
        found, wanted = ours.paca_delta["default"].grad, theirs.paca_delta["default"].grad
        torch.testing.assert_close(found[:, first:end], wanted[:, first:end])
        assert not found[:, :first].any()
        assert not found[:, end:].any()


def test_only_the_channels_of_the_group_are_kept() -> None:
    kept = {}
    for groups in (None, 3):
        model = tiny.adapted(tiny.llama(), r=6, groups=groups, target_modules=["down_proj"]).train()
        layer = tiny.layers_of(model)[0]
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(tuple(t.shape)) or t, lambda t: t):
            layer(torch.randn(2, 5, layer.in_features, requires_grad=True))
        kept[groups] = max(shape[-1] for shape in shapes if len(shape) == 3)
    assert kept == {None: 6, 3: 2}


def test_groups_need_weights_that_hold_their_columns_and_a_column_each() -> None:
    base = tiny.llama()
    with pytest.raises(ValueError, match="groups need weights that hold their columns, this is swap"):
        tiny.adapted(base, groups=2, residency="swap")
    with pytest.raises(ValueError, match=r"groups = 4 is more than the 2 columns that .*v_proj trains"):
        tiny.adapted(base, groups=4, rank_pattern={"v_proj": 2})
    assert not tiny.layers_of(base)


def test_what_an_optimizer_makes_in_its_first_step_is_clean_where_columns_rest(make_optimizer: Any) -> None:
    """Momentum that starts from a weight decay would move a resting column of a loaded adapter later."""
    model = tiny.perturb(tiny.adapted(tiny.llama(), r=6, groups=3))
    optimizer = make_optimizer(parameters(model))
    first, end = schedule_of(model).part(6)
    step(model, optimizer)
    for layer in tiny.layers_of(model):
        for tensor in state_of(optimizer, layer.paca_delta["default"]):
            assert tensor[:, first:end].any()
            assert not tensor[:, :first].any()
            assert not tensor[:, end:].any()


def test_the_first_columns_of_an_adapter_trained_by_groups_load(tmp_path: Path) -> None:
    from paca.convert import export_prefix

    tiny.adapted(tiny.llama(), r=8, groups=4).save_pretrained(tmp_path / "all")
    export_prefix(tmp_path / "all", tmp_path / "two", 2)
    PeftModel.from_pretrained(tiny.llama(), tmp_path / "two")


# ------------------------------------------------------------------------------------------ other columns


def test_new_columns_start_clean_and_old_ones_go_back(make_optimizer: Any) -> None:
    model = tiny.adapted(tiny.llama(), r=8, reselect=3)
    optimizer = make_optimizer(parameters(model))
    for _ in range(2):
        for _ in range(2):
            step(model, optimizer)
        before = {layer.name: layer.paca_indices["default"].clone() for layer in tiny.layers_of(model)}
        # the third step moves first and chooses then; what it would have moved to is not known, so run it on a copy
        step(model, optimizer)
        paca.verify(model)
        pretrained = dict(tiny.llama().named_parameters())
        for layer in tiny.layers_of(model):
            index, delta = layer.paca_indices["default"], layer.paca_delta["default"].detach()
            new = ~torch.isin(index, before[layer.name])
            assert int(new.sum()) == 2
            assert not delta[:, new].any()
            assert delta[:, ~new].any(0).all()
            for moments in state_of(optimizer, layer.paca_delta["default"]):
                assert not moments[:, new].any()
                assert moments[:, ~new].any(0).all()
            weight, was = layer.base_layer.weight, pretrained[f"{layer.name}.weight"]
            untrained = torch.ones(layer.in_features, dtype=torch.bool)
            untrained[index] = False
            assert torch.equal(weight[:, untrained], was[:, untrained])
    shared = [layer for layer in tiny.layers_of(model) if layer.name.endswith(("0.mlp.gate_proj", "0.mlp.up_proj"))]
    assert torch.equal(shared[0].paca_indices["default"], shared[1].paca_indices["default"])


def test_columns_are_chosen_anew_at_the_end_of_each_epoch() -> None:
    model = tiny.adapted(tiny.llama(), reselect="epoch")
    optimizer = OPTIMIZERS["AdamW"](parameters(model))
    with pytest.raises(RuntimeError, match="how many optimizer steps an epoch has"):
        step(model, optimizer)
    steps_an_epoch(model, 3)
    layer, chosen = tiny.layers_of(model)[0], []
    for _ in range(7):
        step(model, optimizer)
        chosen.append(tuple(layer.paca_indices["default"].tolist()))
    assert [one == two for one, two in pairwise(chosen)] == [True, False, True, True, False, True]
    with pytest.raises(ValueError, match="at least 1, or 'epoch'; found 'week'"):
        tiny.config(reselect="week")


def test_the_columns_that_moved_least_are_given_up() -> None:
    model = tiny.adapted(tiny.llama(), r=8, reselect=1, target_modules=["down_proj"])
    layer = tiny.layers_of(model)[0]
    with torch.no_grad():
        layer.paca_delta["default"].copy_(torch.tensor([5.0, 1, 6, 7, 2, 8, 9, 4]).expand(layer.out_features, 8))
    before = layer.paca_indices["default"].clone()
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    step(model, optimizer)
    gone = ~torch.isin(before, layer.paca_indices["default"])
    assert gone.nonzero().flatten().tolist() == [1, 4]
    assert sorted(layer.paca_delta["default"][0].tolist()) == [0, 0, 4, 5, 6, 7, 8, 9]


def test_a_reselected_adapter_is_saved_with_the_columns_it_has(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama(), reselect=2)
    optimizer = OPTIMIZERS["AdamW"](parameters(model))
    for _ in range(4):
        step(model, optimizer)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), tiny.logits(model))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    drawn = tiny.layers_of(tiny.adapted(tiny.llama()))[0]
    assert not torch.equal(saved[f"base_model.model.{drawn.name}.paca_indices"], drawn.paca_indices["default"])


def test_an_optimizer_whose_state_has_no_columns_is_refused_in_its_first_step() -> None:
    model = tiny.adapted(tiny.llama(), reselect=100)
    optimizer = torch.optim.Adafactor(parameters(model), lr=1e-2)
    with pytest.raises(OptimizerError, match="Adafactor keeps its state as"):
        step(model, optimizer)


def test_a_loaded_adapter_with_other_columns_by_now_is_loaded_again(tmp_path: Path) -> None:
    """The fingerprint that it came with is of the columns that it came with."""
    tiny.adapted(tiny.llama(), r=8, reselect=1).save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "first", is_trainable=True)
    step(model, OPTIMIZERS["AdamW"](parameters(model)))
    model.save_pretrained(tmp_path / "second")
    wanted = tiny.logits(model)
    step(model, OPTIMIZERS["AdamW"](parameters(model)))
    model.load_adapter(tmp_path / "second", "default")
    assert torch.equal(tiny.logits(model), wanted)


def test_the_largest_changes_of_a_warm_up_are_trained(tmp_path: Path) -> None:
    warm = tiny.perturb(tiny.adapted(tiny.llama(), r=12))
    warm.save_pretrained(tmp_path)
    model = tiny.adapted(tiny.llama(), r=4, selection="largest_change", warmup_adapter=str(tmp_path))

    def reader(name: str) -> str:
        """One name for the layers of a block that read the same input: they share columns, and are ranked together."""
        return name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")

    for layer, wide in zip(tiny.layers_of(model), tiny.layers_of(warm), strict=True):
        together = [each for each in tiny.layers_of(warm) if reader(each.name) == reader(layer.name)]
        assert len(together) == (3 if "q_proj" in reader(layer.name) else 2 if "gate_proj" in reader(layer.name) else 1)
        moved = torch.stack([each.paca_delta["default"].square().sum(0) for each in together]).sum(0)
        best = wide.paca_indices["default"][moved.topk(4).indices]
        assert layer.paca_indices["default"].tolist() == best.sort().values.tolist()
        assert not layer.paca_delta["default"].any()
    model.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(tiny.llama(), tmp_path / "again")
    with pytest.raises(ValueError, match=r"trained 12 columns of .* and 20 are to be chosen"):
        tiny.adapted(tiny.llama(), r=20, selection="largest_change", warmup_adapter=str(tmp_path))
    tiny.adapted(tiny.llama(), selection="mask_random").save_pretrained(tmp_path / "mask")
    with pytest.raises(AdapterError, match="is for adapters of columns, and this one trains single entries"):
        tiny.adapted(tiny.llama(), selection="largest_change", warmup_adapter=str(tmp_path / "mask"))
    tiny.adapted(tiny.llama(intermediate_size=96)).save_pretrained(tmp_path / "wider")
    with pytest.raises(BaseMismatchError, match="maps 64 to 32 here, and 96 to 32 there"):
        tiny.adapted(
            tiny.llama(),
            selection="largest_change",
            target_modules=["down_proj"],
            warmup_adapter=str(tmp_path / "wider"),
        )


# ------------------------------------------------------------------------------------------ layers that drop out


def test_layers_drop_out_exactly_and_stay_out_of_the_model() -> None:
    probe = tiny.adapted(tiny.llama()).train()
    probe(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    norms = sorted(float(layer.paca_delta["default"].grad.norm()) for layer in tiny.layers_of(probe))
    model = tiny.adapted(tiny.llama(), group_lasso=norms[7])
    optimizer = torch.optim.SGD(parameters(model), lr=0.1)
    for _ in range(10):
        step(model, optimizer)
    idle = {layer.name for layer in tiny.layers_of(model) if not layer.paca_delta["default"].any()}
    assert 0 < len(idle) < 14
    pretrained = dict(tiny.llama().named_parameters())
    for layer in tiny.layers_of(model):
        assert torch.equal(layer.base_layer.weight, pretrained[f"{layer.name}.weight"]) == (layer.name in idle)


def test_the_penalty_is_the_proximal_map_of_the_norm() -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(torch.float64), group_lasso=3.0))
    before = deltas(model)
    step(model, torch.optim.SGD([{"params": parameters(model), "lr": 0.0}], lr=0.0))
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model).items())
    plain = tiny.perturb(tiny.adapted(tiny.llama(torch.float64)))
    for each in (model, plain):
        step(each, torch.optim.SGD(parameters(each), lr=0.01))
    for (name, found), wanted in zip(deltas(model).items(), deltas(plain).values(), strict=True):
        shrunk = wanted * max(0.0, 1 - 0.01 * 3.0 / float(wanted.norm()))
        torch.testing.assert_close(found, shrunk, msg=name)


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("option", [PREFIX, {"groups": 2}, {"reselect": 1}, {"group_lasso": 9.0}], ids=str)
def test_an_adapter_that_the_optimizer_does_not_train_stays_as_it_is(option: dict[str, Any]) -> None:
    model = tiny.perturb(tiny.adapted(tiny.llama(), **option))
    model.add_adapter("other", tiny.config(random_seed=3))
    model.base_model.set_adapter(["default", "other"])
    before, columns = deltas(model), [layer.paca_indices["default"].clone() for layer in tiny.layers_of(model)]
    step(model, torch.optim.SGD([layer.paca_delta["other"] for layer in tiny.layers_of(model)], lr=0.1))
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model).items())
    assert all(map(torch.equal, columns, [layer.paca_indices["default"] for layer in tiny.layers_of(model)]))


def test_a_sum_of_adapters_is_trained_as_any_other() -> None:
    model = tiny.adapted(tiny.llama(), r=8, groups=4, group_lasso=1.0)
    model.base_model.add_weighted_adapter(["default", "default"], [1.0, 1.0], "sum")
    assert {schedule.adapter for layer in tiny.layers_of(model) for schedule in layer.schedules} == {"default"}


@pytest.mark.parametrize("option", [PREFIX, {"groups": 2}, {"reselect": 2}], ids=["prefix", "groups", "reselect"])
def test_a_resumed_run_trains_what_an_uninterrupted_one_does(option: dict[str, Any], tmp_path: Path) -> None:
    def run(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for number in steps:
            step(model, optimizer, seed=number)

    whole = tiny.adapted(tiny.llama(), **option)
    run(whole, OPTIMIZERS["AdamW"](parameters(whole)), range(6))
    first = tiny.adapted(tiny.llama(), **option)
    optimizer = OPTIMIZERS["AdamW"](parameters(first))
    run(first, optimizer, range(3))
    first.save_pretrained(tmp_path)
    second = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    again = OPTIMIZERS["AdamW"](parameters(second))
    again.load_state_dict(optimizer.state_dict())
    go_to(second, 3)
    run(second, again, range(3, 6))
    assert torch.equal(tiny.logits(second), tiny.logits(whole))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"prefix_training": {"min": 3, "max": 9}}, "1 ≤ b ≤ b' ≤ r"),
        ({"prefix_training": {"most": 3}}, "must be {min: b, max: b'}"),
        ({"groups": 1}, "must be a whole number from 2 to r = 4"),
        ({"groups": 2.5}, "must be a whole number from 2 to r = 4"),
        ({"groups": 2, "prefix_training": {"min": 1, "max": 2}}, "choose one"),
        ({"reselect": 0}, "at least 1"),
        ({"group_lasso": -1.0}, "finite and not negative; found -1.0"),
        ({"group_lasso": float("nan")}, "finite and not negative; found nan"),
        ({"group_lasso": "0.5"}, "must be a number"),
        ({"selection": "largest_change"}, "need each other"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(option: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("{", r"\{").replace("}", r"\}")):
        tiny.config(**option)


def test_draws_depend_on_seed_and_step_alone() -> None:
    parts = []
    for seed in (0, 0, 1):
        schedule = Prefixes("default", seed, 1, 64)
        drawn = []
        for number in range(20):
            schedule.step = number
            drawn.append(schedule.part(64))
        parts.append(drawn)
    assert parts[0] == parts[1] != parts[2]
    groups = Groups("default", 0, 3)
    assert {groups.part(7) for groups.step in range(3)} == {(0, 2), (2, 4), (4, 7)}
