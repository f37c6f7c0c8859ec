"""Masks: single entries train in place, and everything that holds for columns holds for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

import paca
from paca.entries import best_entries, padded, random_entries
from paca.errors import AdapterError, BaseMismatchError, StaleColumnsError
from paca.overlap import overlap, overlaps
from paca.saved import read_adapter

RANDOM = {"selection": "mask_random"}
CONV1D = ["c_attn", "c_fc"]


def batch(seed: int = 5) -> dict[str, torch.Tensor]:
    return {"input_ids": tiny.tokens(seed=seed), "labels": tiny.tokens(seed=seed)}


def gradients(base: Any, *seeds: int) -> dict[str, torch.Tensor]:
    """Gradients of all weights in full, summed over batches."""
    base.eval()
    for seed in seeds:
        base(**batch(seed)).loss.backward()
    return {name.removesuffix(".weight"): p.grad for name, p in base.named_parameters() if p.grad is not None}


def entries(layer: Any, name: str = "default") -> torch.Tensor:
    return layer.paca_indices[name]


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


# ------------------------------------------------------------------------------------------ the method


def test_a_mask_trains_as_many_parameters_as_columns_of_the_same_rank_and_starts_as_the_base() -> None:
    mask, columns = tiny.adapted(tiny.llama(), **RANDOM), tiny.adapted(tiny.llama())
    assert mask.get_nb_trainable_parameters() == columns.get_nb_trainable_parameters()
    assert torch.equal(tiny.logits(mask), tiny.logits(tiny.llama()))
    assert torch.equal(tiny.logits(mask, training=True), tiny.logits(tiny.llama(), training=True))


@pytest.mark.parametrize("residency", ["resident", "swap"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gradient_is_that_of_the_whole_weight_at_the_masks_entries(kind: str, residency: str) -> None:
    def base() -> Any:
        return tiny.llama(torch.float64) if kind == "llama" else tiny.gpt2().double()

    targets = "all-linear" if kind == "llama" else CONV1D
    model = tiny.adapted(base(), residency=residency, target_modules=targets, **RANDOM).eval()
    model(**batch()).loss.backward()
    whole = gradients(base(), 5)
    for layer in tiny.layers_of(model):
        wanted = layer.scaling["default"] * whole[layer.name].flatten()[entries(layer)]
        torch.testing.assert_close(layer.paca_delta["default"].grad.flatten(), wanted, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_give_the_same_gradients(reentrant: bool) -> None:
    plain, recomputed = (tiny.perturb(tiny.adapted(tiny.llama(), **RANDOM)).train() for _ in range(2))
    for model in (plain, tiny.recompute(recomputed, reentrant)):
        model(**batch()).loss.backward()
    for one, two in zip(tiny.layers_of(plain), tiny.layers_of(recomputed), strict=True):
        assert torch.equal(one.paca_delta["default"].grad, two.paca_delta["default"].grad)


@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 4, 10), (0, 10)])
def test_inputs_of_any_shape_train(shape: tuple[int, ...]) -> None:
    model = tiny.adapted(tiny.mlp(), target_modules=["first"], task_type=None, **RANDOM)
    [layer] = tiny.layers_of(model)
    x = torch.randn(shape, requires_grad=True)
    layer(x).sum().backward()
    tokens = x.detach().reshape(-1, 10).sum(0)
    wanted = layer.scaling["default"] * tokens.expand(16, 10).flatten()[entries(layer)]
    torch.testing.assert_close(layer.paca_delta["default"].grad.flatten(), wanted)
    torch.testing.assert_close(x.grad, layer.base_layer.weight.sum(0).expand(shape))


def test_a_step_moves_the_masks_entries_and_no_others() -> None:
    model = tiny.adapted(tiny.llama(), **RANDOM)
    tiny.train(model)
    pretrained = tiny.weights_of(tiny.llama())
    for name, weight in tiny.weights_of(model).items():
        layer = next((layer for layer in tiny.layers_of(model) if name == f"{layer.name}.weight"), None)
        moved = (weight != pretrained[name]).flatten().nonzero().flatten()
        allowed = torch.empty(0, dtype=torch.long) if layer is None else entries(layer)
        assert torch.isin(moved, allowed).all()
        assert layer is None or len(moved) > 0.9 * len(allowed)
    paca.verify(model)


class Writes(TorchDispatchMode):
    """Counts writes of single entries."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("scatter_", "index_copy_")
        return func(*args, **(kwargs or {}))


def test_entries_are_written_once_a_step_and_never_in_forward() -> None:
    model = tiny.adapted(tiny.llama(), **RANDOM).train()
    optimizer = optimizer_of(model)
    with Writes() as forward:
        model(**batch()).loss.backward()
        with torch.no_grad():
            model(**batch())
    with Writes() as step:
        optimizer.step()
    assert (forward.count, step.count) == (0, len(tiny.layers_of(model)))
    assert not torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_a_weight_that_was_changed_behind_torchs_back_is_noticed() -> None:
    model = tiny.adapted(tiny.llama(), **RANDOM)
    layer = tiny.layers_of(model)[0]
    layer.base_layer.weight.data.view(-1)[entries(layer)[3]] += 1
    with pytest.raises(StaleColumnsError, match=layer.name):
        paca.verify(model)


def test_entries_that_change_before_backward_are_refused() -> None:
    model = tiny.adapted(tiny.llama(), **RANDOM).train()
    loss = model(**batch()).loss
    tiny.perturb(model)
    paca.refresh(model)
    with pytest.raises(StaleColumnsError, match="changed between forward and backward"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_a_compiled_block_is_one_graph_and_trains_as_an_eager_one(residency: str) -> None:
    torch._dynamo.reset()
    eager, compiled = (tiny.perturb(tiny.adapted(tiny.llama(), residency=residency, **RANDOM)) for _ in range(2))
    paca.refresh(compiled)
    compiled.base_model.model.model.layers[0].mlp.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tiny.train(compiled), tiny.train(eager))
    paca.verify(compiled)


# ------------------------------------------------------------------------------------------ which entries


def test_random_entries_depend_on_seed_and_name_alone_and_all_are_equally_likely() -> None:
    first = random_entries(1000, 300, 1, "a")
    torch.manual_seed(7)
    assert torch.equal(first, random_entries(1000, 300, 1, "a"))
    assert not torch.equal(first, random_entries(1000, 300, 2, "a"))
    assert not torch.equal(first, random_entries(1000, 300, 1, "b"))
    assert torch.equal(random_entries(50, 50, 0, "all"), torch.arange(50))
    hits = torch.zeros(40)
    for seed in range(2000):
        drawn = random_entries(40, 10, seed, "x")
        assert len(drawn.unique()) == 10
        hits[drawn] += 1
    assert (hits / 2000 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_of_equal_scores_the_first_entries_are_taken() -> None:
    assert best_entries(torch.tensor([[1.0, 3, 2], [2, 0, 2]]), 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_largest_weights_are_chosen_by_magnitude(kind: str) -> None:
    base = tiny.llama() if kind == "llama" else tiny.gpt2()
    model = tiny.adapted(base, selection="mask_magnitude", target_modules="all-linear" if kind == "llama" else CONV1D)
    for layer in tiny.layers_of(model):
        sizes = layer.base_layer.weight.abs().flatten()
        rest = torch.ones(len(sizes), dtype=torch.bool)
        rest[entries(layer)] = False
        assert sizes[entries(layer)].min() >= sizes[rest].max()


@pytest.mark.parametrize("selection", ["mask_gradient", "mask_snip"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_calibration_pass_finds_the_largest_gradients_or_sensitivities(kind: str, selection: str) -> None:
    make = tiny.llama if kind == "llama" else tiny.gpt2
    config = tiny.config(selection=selection, target_modules="all-linear" if kind == "llama" else CONV1D)
    base = make()
    model = paca_model(base, paca.calibrate(base, config, [batch(1), batch(2)]))
    whole = gradients(make(), 1, 2)
    for layer in tiny.layers_of(model):
        scores = whole[layer.name].abs()
        if selection == "mask_snip":
            scores = scores * layer.base_layer.weight.abs()
        best = scores.flatten().topk(4 * layer.out_features).indices
        shared = torch.isin(entries(layer), best).float().mean()
        assert shared > 0.995  # rounding may exchange neighbours at the border
    with pytest.raises(ValueError, match="needs a calibration pass"):
        tiny.adapted(make(), **{"selection": selection, "target_modules": config.target_modules})


def paca_model(base: Any, config: paca.PacaConfig) -> Any:
    from peft import get_peft_model

    return get_peft_model(base, config)


def test_entries_may_be_chosen_by_hand_as_many_as_some_columns_have() -> None:
    model = tiny.adapted(tiny.llama(), target_modules=["down_proj"], columns={"down_proj": list(range(64))}, **RANDOM)
    assert [layer.r["default"] for layer in tiny.layers_of(model)] == [2, 2]
    assert tiny.layers_of(model)[0].scaling["default"] == 4
    with pytest.raises(ValueError, match=r"has 65 entries; .* a multiple of 32"):
        tiny.adapted(tiny.llama(), target_modules=["down_proj"], columns={"down_proj": list(range(65))}, **RANDOM)


# ------------------------------------------------------------------------------------------ in service


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for number, name in enumerate("xyz"):
        model = tiny.perturb(tiny.adapted(tiny.llama(), random_seed=number % 2, **RANDOM), seed=number)
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in "xyz"}


def test_a_saved_mask_has_its_own_tensors_and_loads_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama(), **RANDOM)
    tiny.train(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file is no dict
    kinds = {(key.rpartition(".")[2], tensor.dim(), tensor.dtype) for key, tensor in tensors.items()}
    assert kinds == {("paca_mask_delta", 1, torch.float32), ("paca_mask_indices", 1, torch.int32)}
    empty = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(tiny.logits(empty), tiny.logits(model))
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    again.save_pretrained(tmp_path / "again")
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(tiny.llama(seed=1), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["peft", "bank"])
def test_the_pretrained_bits_come_back_after_random_switches(
    folders: dict[str, Path], way: str, dtype: torch.dtype
) -> None:
    pretrained, choices = tiny.weights_of(tiny.llama(dtype)), random.Random(0)
    alone = {name: tiny.logits(PeftModel.from_pretrained(tiny.llama(dtype), folders[name])) for name in folders}
    if way == "bank":
        bank = paca.AdapterBank(tiny.llama(dtype))
        for name, folder in folders.items():
            bank.load(name, folder)
        model, switch = bank.model, bank.swap
    else:
        model = PeftModel.from_pretrained(tiny.llama(dtype), folders["x"], adapter_name="x")
        for name in ("y", "z"):
            model.load_adapter(folders[name], name)
        switch = model.set_adapter
    for _ in range(100):
        switch(choices.choice("xyz"))
    for name in folders:
        switch(name)
        assert torch.equal(tiny.logits(model), alone[name])
    if way == "bank":
        switch(None)
        assert tiny.same_bits(tiny.weights_of(model), pretrained)
    else:
        state = model.get_base_model().state_dict()
        kept = {key.replace(".base_layer", ""): value for key, value in state.items() if ".paca_" not in key}
        assert all(torch.equal(kept[name], value) for name, value in pretrained.items())
        with model.disable_adapter():
            assert tiny.same_bits(tiny.weights_of(model), pretrained)
        assert tiny.same_bits(tiny.weights_of(model.unload()), pretrained)


def test_merging_keeps_the_bits_and_unmerging_gives_them_back(folders: dict[str, Path]) -> None:
    model = PeftModel.from_pretrained(tiny.llama(), folders["x"])
    wanted, pretrained = tiny.logits(model), tiny.weights_of(tiny.llama())
    model.merge_adapter()
    assert torch.equal(tiny.logits(model), wanted)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert tiny.same_bits(tiny.weights_of(model), pretrained)
    layer = tiny.layers_of(model)[0]
    dense = pretrained[f"{layer.name}.weight"] + layer.get_delta_weight("default")
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_submodule(layer.name).weight, dense)
    assert torch.equal(tiny.logits(merged), wanted)


def test_sums_are_exact_and_a_mask_minus_itself_is_the_base(folders: dict[str, Path]) -> None:
    model = PeftModel.from_pretrained(tiny.llama(), folders["x"], adapter_name="x")
    model.load_adapter(folders["y"], "y")
    model.base_model.add_weighted_adapter(["x", "y"], [1.0, -0.5], "mixed")
    model.base_model.add_weighted_adapter(["x", "x"], [1.0, -1.0], "nothing")
    for layer in tiny.layers_of(model):
        wanted = layer.get_delta_weight("x") - 0.5 * layer.get_delta_weight("y")
        torch.testing.assert_close(layer.get_delta_weight("mixed"), wanted)
    model.set_adapter("nothing")
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
    model.base_model.set_adapter(["x", "y"])
    paca.verify(model)


def test_padding_adds_the_lowest_entries_that_are_missing() -> None:
    assert padded(torch.tensor([0, 2, 9]), 5).tolist() == [0, 1, 2, 3, 9]
    assert padded(torch.tensor([4, 7]), 2).tolist() == [4, 7]


def test_each_row_of_a_batch_has_its_own_mask(folders: dict[str, Path]) -> None:
    model = PeftModel.from_pretrained(tiny.llama(), folders["x"], adapter_name="x").eval()
    model.load_adapter(folders["y"], "y")
    names = ["y", "__base__", "x"]
    with torch.no_grad():
        mixed = model(input_ids=tiny.tokens(), adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            wanted = tiny.logits(tiny.llama())
        else:
            model.set_adapter(name)
            wanted = tiny.logits(model)
        torch.testing.assert_close(mixed[row], wanted[row])


def test_overlap_is_counted_in_entries(folders: dict[str, Path]) -> None:
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    met = overlaps(adapters)
    assert met["x", "z"].shared == met["x", "z"].first  # of one seed
    share = met["x", "y"].shared / met["x", "y"].first
    assert met["x", "y"].by_chance == pytest.approx(met["x", "y"].shared, rel=0.2)
    assert 0 < share < 0.3


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"groups": 2}, "`groups` is about columns"),
        ({"reselect": 5}, "`reselect` is about columns"),
        ({"prefix_training": {"min": 1, "max": 2}}, "`prefix_training` is about columns"),
        ({"copermute": True}, "needs selection='s2ft'"),
    ],
)
def test_options_about_columns_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tiny.config(**RANDOM, **given)


def test_a_weight_has_masks_or_columns_and_a_bank_too(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.adapted(tiny.llama())
    with pytest.raises(ValueError, match="trains columns, and the new one trains a mask"):
        model.add_adapter("mask", tiny.config(**RANDOM))
    tiny.adapted(tiny.llama()).save_pretrained(tmp_path / "columns")
    bank = paca.AdapterBank(tiny.llama())
    bank.load("x", folders["x"])
    with pytest.raises(ValueError, match="holds adapters of masks, and 'columns' is of columns"):
        bank.load("columns", tmp_path / "columns")
    with pytest.raises(AdapterError, match="a mask and columns do not meet"):
        overlap(read_adapter(folders["x"]), read_adapter(tmp_path / "columns"))


@pytest.mark.parametrize(
    "command", [["export", "--to", "lora"], ["export", "--to", "prefix", "--r", "1"], ["compress", "--bits", "8"]]
)
def test_what_is_for_columns_is_refused_in_a_sentence(
    folders: dict[str, Path], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from paca.cli import main

    verb, *options = command
    assert main([verb, str(folders["x"]), *options, "--out", str(tmp_path / "out")]) == 2
    assert "is for adapters of columns, and this one trains single entries (mask_random)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
