"""On a device that torch itself calls hpu: the CPU's bits, dtypes under autocast, and transformers' own Trainer."""

from __future__ import annotations

import itertools

import hpu_place
import pytest
import torch
from tiny_models import adapted, layers_of, llama, tokens
from torch import nn
from torch.utils.data import Dataset

import paca
from paca.graphs import GraphRecorder
from paca.layer import PacaLayer
from paca_hpu import HPUBackend

pytestmark = [
    pytest.mark.skipif(hpu_place.PLACE not in ("emulated", "device"), reason=hpu_place.WITHOUT),
    pytest.mark.filterwarnings("default"),
]
TOKENS, IN, OUT = 24, 300, 32
COLUMNS = {"scattered": [3, 40, 41, 137, 255, 299], "neighbours": [8, 9, 10, 11, 12, 13]}


def integers(*shape, generator, density=0.1):
    """Small integers, mostly zero: every partial sum of a product is exact in bfloat16."""
    values = torch.randint(-2, 3, shape, generator=generator)
    return (values * (torch.rand(*shape, generator=generator) < density)).float()


def step(backend, device, columns, dtype, autocast):
    """One exact training step of one layer; returns all that it made, on the CPU."""
    generator = torch.Generator().manual_seed(3)
    base = nn.Linear(IN, OUT).requires_grad_(False)
    with torch.no_grad():
        base.weight.copy_(integers(OUT, IN, generator=generator))
        base.bias.copy_(torch.randint(-3, 4, (OUT,), generator=generator))
    layer = PacaLayer(base.to(dtype), "layer", backend)
    layer.update_layer("default", torch.tensor(columns), alpha=2 * len(columns))
    layer.to(device)
    delta = layer.paca_delta["default"]
    x = integers(2, TOKENS // 2, IN, generator=generator).to(dtype).to(device).requires_grad_(True)
    gy = integers(2, TOKENS // 2, OUT, generator=generator).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(gy.to(y.dtype))
    torch.optim.SGD([delta], lr=0.5).step()
    weight = layer.get_base_layer().weight
    found = [y, x.grad, delta.grad, delta, weight, layer(x.detach())]
    assert all(tensor.device.type == device for tensor in found)
    return [tensor.detach().cpu() for tensor in found]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(
    ("gather", "write"), list(itertools.product(HPUBackend.choices["gather"], HPUBackend.choices["write"]))
)
def test_one_step_has_the_bits_and_dtypes_of_the_cpu(gather, write, columns, dtype, autocast):
    wanted = step(paca.set_backend("cpu"), "cpu", COLUMNS[columns], dtype, autocast)
    found = step(paca.set_backend("hpu", gather=gather, write=write), "hpu", COLUMNS[columns], dtype, autocast)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_backend_tells_of_its_device_and_memory():
    backend = paca.get_backend()
    assert backend.name == "hpu"  # detected: its priority is above the CPU's
    assert backend.device().type == "hpu"
    backend.reset_peak_memory()
    before = backend.memory()
    block = torch.ones(2**20, device="hpu")
    during = backend.memory()
    assert during.allocated - before.allocated == 2**22
    del block
    assert backend.memory().peak >= during.allocated > backend.memory().allocated
    backend.reset_peak_memory()
    assert backend.memory().peak < during.allocated


def test_on_the_device_itself_the_recorder_finds_a_clean_step():
    paca.set_backend("hpu")
    model = adapted(llama(attn_implementation="eager", use_cache=False)).to("hpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = {"input_ids": tokens().to("hpu"), "labels": tokens().to("hpu")}
    batch["attention_mask"] = torch.ones_like(batch["labels"])  # transformers 5 looks for packed rows without one
    model.train()
    model(**batch)  # writes the columns after the move
    recorder = GraphRecorder(model, warm_up=2)
    with recorder.watching():
        for _ in range(5):
            model(**batch).loss.backward()
            recorder.cut()
            optimizer.step()
            optimizer.zero_grad()
            recorder.end_step()
    print("\n".join(recorder.report()))
    assert recorder.is_clean
    paca.verify(model)


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda loss: loss.item(), "aten._local_scalar_dense.default"),
        (lambda loss: loss.detach().cpu(), "aten._to_copy.default"),
        (lambda loss: loss.detach().to("cpu"), "aten._to_copy.default"),
        (lambda loss: print(loss), "Tensor.__repr__"),
    ],
)
def test_on_the_device_itself_a_planted_read_is_found_once(read, found):
    paca.set_backend("hpu")
    model = adapted(llama(attn_implementation="eager", use_cache=False)).to("hpu")
    batch = {"input_ids": tokens().to("hpu"), "labels": tokens().to("hpu")}
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    model(**batch)  # writes the columns after the move
    recorder = GraphRecorder(model)
    with recorder.watching():
        read(model(**batch).loss)
    assert [offence.operation for offence in recorder.offences] == [found]
    assert "test_emulated_device.py:" in recorder.offences[0].where


class Rows(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, row):
        numbers = 3 + (row + torch.arange(10)) % 6
        return {"input_ids": numbers, "attention_mask": torch.ones_like(numbers), "labels": numbers}


@pytest.mark.skipif(
    hpu_place.has_gaudi_trainer(), reason="optimum-habana is installed: GaudiTrainer is the Trainer here"
)
@pytest.mark.skipif(hpu_place.LAZY, reason="of eager mode only")
def test_transformers_own_trainer_finds_the_device_trains_and_resumes_to_the_same_bits(tmp_path):
    import transformers

    assert paca.get_backend().name == "hpu"
    assert paca.trainer_class() is transformers.Trainer

    def trainer(folder):
        from tiny_models import CHECKPOINTING

        args = paca.training_arguments_class()(
            output_dir=str(folder),
            max_steps=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=5e-2,
            bf16=True,
            save_steps=4,
            report_to=[],
            disable_tqdm=True,
            **{f"{CHECKPOINTING.replace('activation', 'gradient')}": True},
        )
        assert args.device.type == "hpu"
        return paca.trainer_class()(
            model=adapted(llama(attn_implementation="eager", use_cache=False)), args=args, train_dataset=Rows()
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert layers_of(whole.model)[0].get_base_layer().weight.device.type == "hpu"
    paca.verify(whole.model)
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for one, other in zip(layers_of(resumed.model), layers_of(whole.model), strict=True):
        assert torch.equal(one.paca_delta["default"].cpu(), other.paca_delta["default"].cpu())
    print("losses", losses)
