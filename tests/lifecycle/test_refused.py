"""What cannot work is refused before any layer is replaced, and the message says what to do."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from peft import get_peft_model
from torch import nn

import paca


class Mixed(nn.Module):
    """One module of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.LayerNorm(4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.linear = nn.Linear(4, 8)
        self.wide = nn.Linear(8, 4)
        self.own = OwnLinear(4, 4)


class OwnLinear(nn.Linear):
    """A linear whose forward is its own, as quantised ones are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def refuse(model, match: str, error=ValueError, **given) -> None:
    """Adapting must raise, and leave the model as it was."""
    kinds = [type(module) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        get_peft_model(model, paca.PacaConfig(**given))
    assert [type(module) for module in model.modules()] == kinds
    assert tiny.same_bits(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize("r", [0, -1, 2.5, True, "8", None])
def test_a_rank_that_is_no_positive_whole_number_is_refused(r):
    with pytest.raises(ValueError, match=r"`r` must be a whole number greater than 0, found "):
        paca.PacaConfig(r=r)
    with pytest.raises(ValueError, match=r"`rank_pattern\['q_proj'\]` must be a whole number greater than 0"):
        paca.PacaConfig(rank_pattern={"q_proj": r})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"selection": "best"}, "`selection` must be one of random, weight_norm, .*; found 'best'"),
        ({"residency": "vram"}, "`residency` must be one of auto, resident, swap; found 'vram'"),
        ({"bias": "lora_only"}, "`bias` must be one of none, all, paca_only; found 'lora_only'"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(given, match):
    with pytest.raises(ValueError, match=match):
        paca.PacaConfig(**given)


def test_a_rank_above_the_number_of_inputs_is_refused():
    refuse(
        Mixed(),
        r"r = 6 is more than the 4 input columns of linear .*choose r ≤ 4, set rank_pattern",
        r=6,
        target_modules=["linear", "wide"],
    )
    refuse(
        Mixed(), r"r = 9 is more than the 4 input columns", r=2, rank_pattern={"linear": 9}, target_modules=["linear"]
    )


def test_a_rank_of_all_inputs_is_full_training_of_the_weight():
    model = get_peft_model(Mixed(), paca.PacaConfig(r=4, target_modules=["linear"]))
    assert model.base_model.model.linear.paca_indices["default"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["embedding", "conv", "norm", "bilinear"])
def test_a_module_that_is_no_linear_is_refused(kind):
    match = rf"{kind}: PaCA adapts torch.nn.Linear and transformers Conv1D, found torch.nn.*Name other target_modules"
    refuse(Mixed(), match, TypeError, r=2, target_modules=[kind, "linear"])


def test_a_linear_with_a_forward_of_its_own_is_refused():
    refuse(Mixed(), r"own: .*OwnLinear.* Its forward is its own", TypeError, r=2, target_modules=["own"])


def test_no_matching_module_is_refused():
    with pytest.raises(ValueError, match=r"nothing_here.* not found in the base model"):
        get_peft_model(Mixed(), paca.PacaConfig(r=2, target_modules=["nothing_here"]))


def test_no_targets_for_an_unknown_architecture_is_refused():
    refuse(Mixed(), "Please specify `target_modules` in `peft_config`", r=2)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"linear": [0, 4]}, r"linear: columns must lie in 0…3, found 0…4"),
        ({"linear": [-1, 2]}, r"linear: columns must lie in 0…3, found -1…2"),
        ({"linear": [1, 1]}, r"linear: columns must differ, found 1 more than once"),
        ({"linear": []}, r"linear: columns must be a non-empty list of whole numbers"),
        ({"linear": [0.5, 1]}, r"linear: columns must be a non-empty list of whole numbers"),
        ({"linear": [True, False]}, r"linear: columns must be a non-empty list of whole numbers"),
        ({"elsewhere": [1]}, r"columns\['elsewhere'\] matches no targeted layer"),
        ({"wide": [1]}, r"columns\['wide'\] matches no targeted layer"),
    ],
)
def test_hand_chosen_columns_that_cannot_be_are_refused(columns, match):
    refuse(Mixed(), match, r=2, target_modules=["linear"], columns=columns)


def test_a_second_adapter_that_does_not_fit_leaves_the_first_at_work():
    model = get_peft_model(tiny.mlp(), paca.PacaConfig(r=4, target_modules=["first"]))
    tiny.perturb(model)
    x = torch.randn(3, 10)
    before = model(x)
    with pytest.raises(ValueError, match=r"r = 11 is more than the 10 input columns of first"):
        model.add_adapter("other", paca.PacaConfig(r=11, target_modules=["first"]))
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert all("other" not in layer.paca_delta for layer in tiny.layers_of(model))


def test_a_base_weight_that_trains_as_well_is_refused_in_forward():
    model = get_peft_model(tiny.mlp(), paca.PacaConfig(r=4, target_modules=["first"]))
    model.base_model.model.first.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"first: the base weight requires a gradient"):
        model(torch.randn(3, 10))


def test_data_parallel_is_refused():
    model = get_peft_model(tiny.mlp(), paca.PacaConfig(r=4, target_modules=["first"]))
    with pytest.raises(RuntimeError, match=r"torch.nn.DataParallel copies the model in every step"):
        tiny.layers_of(model)[0]._replicate_for_data_parallel()
