"""A step gives a compiling device the same graphs every time and never stops it; the recorder sees where one would."""

from __future__ import annotations

import numpy
import pytest
import torch
from tiny_models import adapted, llama, recompute

import paca
from paca import training
from paca.cli import main
from paca.graphs import GraphRecorder

ACCUMULATION = 2


def train(model, steps, batches=None, before_step=lambda: None, warm_up=2):
    """Train by hand under the recorder, cutting where GaudiTrainer marks a step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)
    generator = torch.Generator().manual_seed(0)
    recorder = GraphRecorder(model, warm_up)
    with recorder.watching():
        for step in range(steps):
            for _ in range(ACCUMULATION):
                rows = batches[step] if batches else 2
                tokens = torch.randint(3, 64, (rows, 8), generator=generator)
                model(input_ids=tokens, labels=tokens).loss.backward()
                recorder.cut()
            before_step()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            recorder.end_step()
    return recorder


def model_on(**strategies):
    paca.set_backend("hpu-rehearsal", **strategies)
    return adapted(llama(attn_implementation="eager"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_twenty_steps_compile_nothing_after_the_warm_up_and_stop_nowhere(checkpointing):
    model = model_on()
    if checkpointing:
        recompute(model, reentrant=False)
    recorder = train(model, 20)
    assert recorder.compilations[2:] == [0] * 18
    assert recorder.offences == []
    assert recorder.is_clean
    assert len({len(step.graphs) for step in recorder.steps}) == 1
    assert len(recorder.steps[5].graphs) == ACCUMULATION + 2  # each backward, the optimizer, the write
    paca.verify(model)


@pytest.mark.parametrize("write", ["index_copy", "scatter", "index_put"])
@pytest.mark.parametrize("gather", ["auto", "one_hot", "index_select", "slice"])
def test_every_strategy_writes_each_weight_once_a_step_in_a_graph_of_its_own(write, gather):
    recorder = train(model_on(write=write, gather=gather), 3)
    assert recorder.is_clean
    last = recorder.steps[-1].graphs[-1]
    assert sum(f"{write}_" in operation.name for operation in last) == 14  # seven linears in each of two layers
    assert not any("mm" in operation.name for operation in last)


def here(needle):
    """File and line of the one line of this file that ends with a marker."""
    with open(__file__, encoding="utf-8") as file:
        lines = [number for number, line in enumerate(file, 1) if line.rstrip().endswith("# " + needle)]
    assert len(lines) == 1
    return f"test_hpu_graphs.py:{lines[0]}"


def test_a_planted_item_is_found_with_its_line():
    model = model_on()
    norm = model.base_model.model.model.norm

    def look(module, args, out):
        out.sum().item()  # planted item

    norm.register_forward_hook(look)
    recorder = train(model, 2)
    assert not recorder.is_clean
    assert {offence.kind for offence in recorder.offences} == {"host sync"}
    assert all(offence.where.endswith(here("planted item")) for offence in recorder.offences)
    assert len(recorder.offences) == 2 * ACCUMULATION
    assert any(here("planted item") in line and "host sync" in line for line in recorder.report())


@pytest.mark.parametrize(
    ("name", "read"),
    {
        "tolist": lambda out: out.tolist(),
        "numpy": lambda out: out.numpy(),
        "__array__": lambda out: numpy.asarray(out),
        "cpu": lambda out: out.cpu(),
        "to": lambda out: (out.to("cpu"), out.to(device="cpu")),
        "__repr__": lambda out: (print(out.sum()), str(out)),
    }.items(),
)
def test_a_planted_copy_to_the_host_is_found_where_the_cpu_runs_no_operation_for_it(name, read):
    model = model_on()

    def look(module, args, out):
        read(out.detach().to(out.device))

    model.base_model.model.model.norm.register_forward_hook(look)
    recorder = train(model, 2)
    assert {(offence.kind, offence.operation) for offence in recorder.offences} == {
        ("copy to the host", f"Tensor.{name}")
    }
    assert all("test_hpu_graphs.py:" in offence.where for offence in recorder.offences)
    reads = 2 if name in ("to", "__repr__") else 1
    assert len(recorder.offences) == 2 * ACCUMULATION * reads
    assert f"host syncs               {4 * reads}" in recorder.report()


@pytest.mark.parametrize(("size", "kinds"), [(None, {"shape that depends on data"}), (32, set())])
def test_repeats_by_data_are_found_unless_their_number_is_given(size, kinds):
    model = model_on()

    def repeat(module, args, out):
        torch.repeat_interleave(torch.ones_like(out[0, 0], dtype=torch.long), output_size=size)

    model.base_model.model.model.norm.register_forward_hook(repeat)
    assert {offence.kind for offence in train(model, 2).offences} == kinds


def test_a_planted_boolean_mask_is_found_with_its_line():
    model = model_on()

    def mask(module, args, out):
        return out + 0 * out[out > 0].sum()  # planted mask

    model.base_model.model.model.norm.register_forward_hook(mask)
    recorder = train(model, 2)
    assert not recorder.is_clean
    found = [offence.where for offence in recorder.offences if offence.kind == "boolean mask as an index"]
    assert found[0].endswith(here("planted mask"))  # and its gradient, where backward is called


def test_a_ragged_last_batch_is_a_recompilation_with_the_line_and_the_shapes():
    recorder = train(model_on(), 4, batches=[2, 2, 2, 1])
    assert recorder.compilations[2] == 0
    assert recorder.recompilations > 0
    assert recorder.offences == []
    line = next(line for line in recorder.report() if line.startswith("step 4:"))
    assert "[1, 8]" in line
    assert "[2, 8]" in line


def test_a_second_write_in_a_step_and_a_write_outside_of_it_are_noticed():
    model = model_on()
    recorder = train(model, 3, before_step=lambda: paca.refresh(model))
    assert recorder.offences == []
    assert not recorder.is_clean
    assert "not once a step" in "\n".join(recorder.report())


def test_the_recorder_leaves_the_model_as_it_was():
    model = model_on()
    ops = [module.adapted.ops for module in model.modules() if isinstance(module, paca.PacaLayer)]
    train(model, 2)
    assert [module.adapted.ops for module in model.modules() if isinstance(module, paca.PacaLayer)] == ops
    assert len(set(ops)) == 1
    assert not model._forward_pre_hooks


@pytest.fixture
def recipe(tmp_path):
    """A recipe for a tiny model with 21 rows that fill their length."""
    import json
    import os

    from tiny_models import tokenizer

    model = tmp_path / "model"
    llama().save_pretrained(model)
    tokenizer().save_pretrained(model)
    rows = [{"text": " ".join(f"w{3 + (row + place) % 50}" for place in range(20))} for row in range(21)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    return [
        *("doctor", "--graphs", str(tmp_path / "my.yaml"), "--steps", "4"),
        *("--model_name_or_path", str(model), "--train_file", str(tmp_path / "rows.jsonl"), "--r", "4"),
        *("--max_length", "16", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "out")),
    ]


def test_the_doctor_examines_a_recipe_and_says_what_to_put_right(tmp_path, recipe, capsys):
    (tmp_path / "my.yaml").write_text("gradient_accumulation_steps: 2\n")
    assert main([*recipe, "--attn_implementation", "eager"]) == 0
    said = capsys.readouterr().out
    assert "compiled after that      0" in said
    assert "host syncs               0" in said
    assert "nothing to put right" in said
    assert "an epoch of 21 rows ends with a batch of 1 instead of 2" in said
    assert not (tmp_path / "out").exists()

    assert main(recipe) == 2  # sdpa asks on the host whether the mask is full
    said = capsys.readouterr()
    assert "masking_utils.py:" in said.out
    assert "host sync" in said.out
    assert "what to put right is listed above" in said.err


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile instantiates it
@pytest.mark.parametrize("planted", [False, True])
def test_the_doctor_counts_what_torch_compile_makes_in_a_run_of_its_own(monkeypatch, tmp_path, recipe, capsys, planted):
    def with_break(*args, **options):
        model = adapted_model(*args, **options)
        model.register_forward_hook(lambda module, args, out: torch._dynamo.graph_break())
        return model

    adapted_model = training.adapted_model
    monkeypatch.setattr(training, "adapted_model", with_break if planted else adapted_model)
    (tmp_path / "my.yaml").write_text("backend: hpu\nattn_implementation: eager\nstrategies: {write: scatter}\n")
    assert main([*recipe, "--strategies", "{graph: compile, write: scatter}"]) == (2 if planted else 0)
    said = capsys.readouterr().out
    assert "write=scatter" in said
    assert "torch.compile's graphs   1, 0, 0, 0 in steps 1 to 4" in said
    assert ("graph break: " in said) is planted
