"""What one backend saves, every other loads with the same bits; a run that moves between them ends as one that stays.

Every usable backend meets every other. The exact block makes the strongest claim possible: training goes on elsewhere,
and comes back, without a bit of difference from a run that never moved.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import adapted, layers_of, llama, perturb, tokens
from transformers import Trainer, TrainingArguments

import paca
from paca.parity import block
from paca.parity.coverage import dtypes_of
from paca.parity.record import REFERENCE, read

USABLE = [name for name, why in paca.available_backends().items() if why is None]
# From one backend to another and back; where there is but one, to itself.
JOURNEYS = [(a, b) for a, b in itertools.product(USABLE, USABLE) if a != b or len(USABLE) == 1]
MOMENTUM = 0.5


def move(model, backend):
    return model.to(backend.device())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


@pytest.mark.parametrize(("here", "there"), JOURNEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_goes_there_and_back_unchanged(here, there, dtype, tmp_path: Path):
    backend = paca.set_backend(here)
    model = move(perturb(adapted(llama(dtype))), backend)
    paca.refresh(model)
    model.save_pretrained(tmp_path / "first")
    written = {layer.name: layer.adapted.matrix.detach().cpu().clone() for layer in layers_of(model)}
    files = ["first"]
    for name in (there, here):
        backend = paca.set_backend(name)
        loaded = move(PeftModel.from_pretrained(llama(dtype), tmp_path / files[-1]), backend)
        for layer in layers_of(loaded):
            assert torch.equal(layer.adapted.matrix.detach().cpu(), written[layer.name])
        paca.verify(loaded)
        files.append(f"by-{name}-{len(files)}")
        loaded.save_pretrained(tmp_path / files[-1])
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in files]
    assert same(saved[0], saved[1])
    assert same(saved[0], saved[2])
    configs = [settings_of(tmp_path / name) for name in files]
    assert configs[0] == configs[1] == configs[2]


def settings_of(adapter: Path) -> dict[str, object]:
    """The saved config; PEFT writes sets as lists, in any order."""
    found = json.loads((adapter / "adapter_config.json").read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in found.items()}


def train_on(names, dtype, tmp_path: Path, residency: str) -> dict[str, torch.Tensor]:
    """Train the exact block, step after step on the next of these backends, each from the checkpoint of the last."""
    numbers, file, state = read(REFERENCE).block, tmp_path / "checkpoint.pt", {}
    for step, name in enumerate(names):
        backend = paca.set_backend(name)
        model = block.block_model(numbers, dtype, backend, residency)
        deltas = [layer.paca_delta["default"] for layer in layers_of(model)]
        optimizer = torch.optim.SGD(deltas, lr=block.LEARNING_RATE, momentum=MOMENTUM)
        if file.exists():
            saved = torch.load(file, map_location=backend.device())
            set_peft_model_state_dict(model, saved["adapter"])
            optimizer.load_state_dict(saved["optimizer"])
        state[f"y{step}"] = block.block_step(model, numbers, step, dtype, backend).detach().cpu().float()
        optimizer.step()
        torch.save({"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}, file)
    file.unlink()
    return state | block.block_state(layers_of(model))


def staying(dtype, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The same run on the reference, in one piece."""
    numbers, backend = read(REFERENCE).block, paca.set_backend("cpu")
    model = block.block_model(numbers, dtype, backend)
    deltas = [layer.paca_delta["default"] for layer in layers_of(model)]
    optimizer = torch.optim.SGD(deltas, lr=block.LEARNING_RATE, momentum=MOMENTUM)
    state = {}
    for step in range(4):
        state[f"y{step}"] = block.block_step(model, numbers, step, dtype, backend).detach().float()
        optimizer.step()
        optimizer.zero_grad()
    return state | block.block_state(layers_of(model))


@pytest.mark.parametrize(("here", "there"), JOURNEYS)
@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_a_run_that_moves_ends_with_the_bits_of_one_that_stays(here, there, residency, tmp_path: Path):
    for dtype in (torch.float32, torch.bfloat16):
        if not all(dtype in dtypes_of(name) for name in (here, there)):
            pytest.skip(f"{here} and {there} do not both compute in {dtype}")
        moved = train_on([here, there, here, there], dtype, tmp_path, residency)
        assert same(moved, staying(dtype, tmp_path))


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = tokens(rows=16, length=8)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


def trainer(name: str, folder: Path, steps: int) -> Trainer:
    """A Trainer of AdamW with a schedule, on a backend's device and by its own arguments."""
    backend = paca.set_backend(name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=backend.device().type == "cpu",
        seed=7,
    )
    return Trainer(model=adapted(llama()), args=arguments, train_dataset=Rows())


class LoadedState(RuntimeError):
    """Raised to stop a run as soon as it has resumed."""


@pytest.mark.parametrize(("here", "there"), JOURNEYS)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_trainers_checkpoint_loads_everywhere_with_its_bits(here, there, tmp_path: Path):
    """Adapter, moments of AdamW, step counts and learning rate, read just before the first resumed step."""
    trainer(here, tmp_path / "run", 2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = trainer(there, tmp_path / "resumed", 4)
    seen = {}

    def look(*args, **kwargs):
        seen["adapter"] = {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(resumed.model).items()}
        seen["optimizer"] = resumed.optimizer.state_dict()
        raise LoadedState

    resumed.training_step = look
    with pytest.raises(LoadedState):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(seen["adapter"], load_file(checkpoint / "adapter_model.safetensors"))
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu")
    assert len(saved["state"]) == len(seen["optimizer"]["state"]) > 0
    for number, moments in saved["state"].items():
        assert same(moments, seen["optimizer"]["state"][number])
    assert [group["lr"] for group in seen["optimizer"]["param_groups"]] == [g["lr"] for g in saved["param_groups"]]
    paca.verify(resumed.model)
