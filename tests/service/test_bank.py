"""A bank swaps adapters into a plain model: the outputs PEFT gives, pretrained bits back, a clear no where it must."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_switching import ElementsWritten

import paca
from paca.saved import read_adapter


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Saved adapters of one tiny Llama: a and b train the same columns, c others, d some layers only."""
    options: dict[str, dict[str, Any]] = {
        "a": {"random_seed": 1},
        "b": {"random_seed": 1},
        "c": {"random_seed": 2, "r": 3, "paca_alpha": 3, "alpha_pattern": {"v_proj": 12}},
        "d": {"target_modules": ["down_proj"]},
    }
    for number, (name, config) in enumerate(options.items()):
        model = tiny.perturb(tiny.adapted(tiny.llama(), **config), seed=number)
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in options}


def bank_of(folders: dict[str, Path], base: Any = None, **options: Any) -> paca.AdapterBank:
    bank = paca.AdapterBank(tiny.llama() if base is None else base, **options)
    for name, folder in folders.items():
        bank.load(name, folder)
    return bank


def parameters(bank: paca.AdapterBank) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in bank.model.named_parameters()}


def test_a_swapped_model_gives_the_bits_that_peft_gives(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    for name in [*folders, *reversed(folders)]:
        bank.swap(name)
        wanted = PeftModel.from_pretrained(tiny.llama(), folders[name])
        assert torch.equal(tiny.logits(bank.model), tiny.logits(wanted)), name
        assert bank.active == name


def test_the_writes_of_a_swap_are_a_graph_of_their_own(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    told: list[str] = []
    switch = bank._ops.switch_columns
    bank._ops = replace(
        bank._ops,
        end_graph=lambda: told.append("end"),
        switch_columns=lambda changes: (told.append("write"), switch(changes))[1],
    )
    for name in ("a", "c", None):
        bank.swap(name)
    assert told == ["end", "write", "end"] * 3


def test_conv1d_weights_are_swapped_too(tmp_path: Path) -> None:
    model = tiny.perturb(tiny.adapted(tiny.gpt2(), target_modules=["c_attn", "c_fc"]))
    model.save_pretrained(tmp_path)
    bank = paca.AdapterBank(tiny.gpt2())
    bank.load("a", tmp_path)
    bank.swap("a")
    assert torch.equal(tiny.logits(bank.model), tiny.logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pretrained_bits_come_back_after_a_thousand_random_swaps(
    folders: dict[str, Path], dtype: torch.dtype
) -> None:
    bank = bank_of(folders, tiny.llama(dtype), on_device=2)
    pretrained = parameters(bank)
    choices = random.Random(0)
    for _ in range(1000):
        bank.swap(choices.choice([*folders, None]))
        assert len(bank.prefetched) <= 2
    bank.swap("c")
    assert not tiny.same_bits(parameters(bank), pretrained)
    bank.swap(None)
    assert tiny.same_bits(parameters(bank), pretrained)


def test_between_adapters_of_one_seed_a_swap_writes_each_column_once_and_restores_none(
    folders: dict[str, Path],
) -> None:
    bank = bank_of(folders)
    bank.prefetch("b")
    bank.swap("a")
    with ElementsWritten() as counter:
        bank.swap("b")
    assert counter.elements == sum(layer.delta.numel() for layer in read_adapter(folders["b"]).layers.values())


@pytest.mark.parametrize(("first", "last"), [([1, 5], [2, 7]), ([1, 5], [5, 7]), ([1, 5], [1, 5])], ids=str)
def test_columns_of_both_adapters_end_with_the_new_values(first: list[int], last: list[int], tmp_path: Path) -> None:
    for name, chosen in (("a", first), ("b", last)):
        model = tiny.adapted(tiny.mlp(), columns={"first": chosen}, target_modules=["first"], task_type=None)
        tiny.perturb(model, seed=len(name + str(chosen))).save_pretrained(tmp_path / name)
    bank = paca.AdapterBank(tiny.mlp())
    bank.load("a", tmp_path / "a")
    bank.load("b", tmp_path / "b")
    bank.swap("a")
    bank.swap("b")
    wanted = PeftModel.from_pretrained(tiny.mlp(), tmp_path / "b")
    assert torch.equal(bank.model.first.weight, wanted.base_model.model.first.base_layer.weight)
    bank.swap(None)
    assert torch.equal(bank.model.first.weight, tiny.mlp().first.weight)


def test_a_swap_to_the_adapter_that_is_in_writes_nothing(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    bank.swap("a")
    with ElementsWritten() as counter:
        bank.swap("a")
    assert counter.elements == 0


def test_adapters_of_one_seed_share_the_pretrained_columns_that_they_replace(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    bank.prefetch("a")
    alone = bank.device_bytes()
    bank.swap("a")  # what is shared must be pretrained values, not those that the weight holds now
    bank.prefetch("b")
    deltas = sum(layer.delta.numel() * 4 for layer in read_adapter(folders["b"]).layers.values())
    assert bank.device_bytes() == alone + deltas
    bank.swap("b")
    bank.swap(None)
    assert tiny.same_bits(parameters(bank), {name: p.detach() for name, p in tiny.llama().named_parameters()})


def test_the_least_recently_used_adapter_leaves_the_device(folders: dict[str, Path]) -> None:
    bank = bank_of(folders, on_device=2)
    for name in ("a", "b", "a", "c"):
        bank.prefetch(name)
    assert bank.prefetched == ["a", "c"]
    assert bank.names == ["a", "b", "c", "d"]
    bank.evict("a")
    assert bank.prefetched == ["c"]


def test_a_block_uses_an_adapter_and_puts_the_one_before_back(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    bank.swap("a")
    with bank.using("c") as model:
        assert bank.active == "c"
        assert model is bank.model
    assert bank.active == "a"


def test_the_adapter_in_use_cannot_be_evicted_or_removed(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    bank.swap("a")
    for leave in (bank.evict, bank.remove):
        with pytest.raises(ValueError, match="the model holds 'a' now"):
            leave("a")
    bank.swap("b")
    bank.remove("a")
    with pytest.raises(KeyError, match="no adapter 'a'; it has: b, c, d"):
        bank.swap("a")


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(folders: dict[str, Path]) -> None:
    bank = paca.AdapterBank(tiny.llama(seed=1))
    with pytest.raises(paca.BaseMismatchError, match="made for another base model"):
        bank.load("a", folders["a"])
    with pytest.raises(ValueError, match=r"trains model\.layers.*no such module"):
        paca.AdapterBank(tiny.mlp()).load("a", folders["a"])
    assert bank.names == []


def test_what_is_no_column_is_refused(tmp_path: Path) -> None:
    tiny.adapted(tiny.llama(), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="also trains lm_head"):
        paca.AdapterBank(tiny.llama()).load("a", tmp_path)


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    tiny.adapted(copy.deepcopy(base), target_modules=["0"], task_type=None).save_pretrained(tmp_path)
    base[1].weight = base[0].weight
    with pytest.raises(ValueError, match="weight of 0 cannot hold columns: it is tied"):
        paca.AdapterBank(base).load("a", tmp_path)


def test_a_quantised_weight_is_refused(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    tiny.adapted(torch.nn.Sequential(torch.nn.Linear(64, 64)), target_modules=["0"], task_type=None).save_pretrained(
        tmp_path
    )
    quantised = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    with pytest.raises(ValueError, match="weight of 0 cannot hold columns: it is quantised"):
        paca.AdapterBank(quantised).load("a", tmp_path)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="on_device must be at least 1, found 0"):
        paca.AdapterBank(tiny.mlp(), on_device=0)
    with pytest.raises(ValueError, match="pin_memory is for models on an accelerator"):
        paca.AdapterBank(tiny.mlp(), pin_memory=True)


def test_a_model_with_adapters_has_no_bank() -> None:
    with pytest.raises(ValueError, match=r"works on the base model.*unload\(\) it first"):
        paca.AdapterBank(tiny.adapted(tiny.llama()))


def test_weights_that_hold_one_banks_adapter_are_nobody_elses(folders: dict[str, Path]) -> None:
    base = tiny.llama()
    one, two = bank_of(folders, base), bank_of(folders, base)
    two.prefetch("c")
    one.swap("a")
    for use in (lambda: two.swap("c"), lambda: two.prefetch("d"), lambda: two.load("e", folders["a"])):
        with pytest.raises(RuntimeError, match=r"has its adapter 'a' in this model's weights; call swap\(None\)"):
            use()
    with pytest.raises(RuntimeError, match="has its adapter 'a' in this model's weights"):
        tiny.adapted(base)
    one.swap(None)
    two.swap("c")
    two.swap(None)
    assert tiny.same_bits(parameters(two), {name: p.detach() for name, p in tiny.llama().named_parameters()})
    tiny.adapted(base)
    with pytest.raises(RuntimeError, match=r"was replaced since the bank was made, or has an adapter"):
        one.prefetch("d")


def test_a_model_that_was_moved_is_refused(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    bank.swap("a")
    bank.model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="moved or replaced"):
        bank.swap("b")


def test_a_damaged_adapter_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    file = folders["a"] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(".paca_indices"))
    tensors[key][:] = 3
    save_file(tensors, file)
    with pytest.raises(ValueError, match="column numbers must differ"):
        paca.AdapterBank(tiny.llama()).load("a", folders["a"])
