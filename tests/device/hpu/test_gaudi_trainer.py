"""The real GaudiTrainer of optimum-habana trains a PaCA model, on the stand-in or on the emulated device.

A lazy process runs lazy mode, any other one `torch.compile` with a compiler of the vendor's name that computes as
PyTorch does.
"""

from __future__ import annotations

import copy
import os
from contextlib import ExitStack

import hpu_place
import pytest
import torch
from tiny_models import adapted, layers_of, llama, tokens, weights_of
from torch.utils.data import Dataset

import paca
from paca.graphs import GraphRecorder
from paca_hpu import HPUBackend

pytestmark = [
    pytest.mark.skipif(hpu_place.PLACE not in ("standin", "emulated"), reason=hpu_place.WITHOUT),
    pytest.mark.skipif(not hpu_place.has_gaudi_trainer(), reason="optimum-habana is not installed here"),
    pytest.mark.filterwarnings("default"),  # optimum-habana and its transformers warn of their own
]
lazy_only = pytest.mark.skipif(not hpu_place.LAZY, reason="of lazy mode only")
eager_only = pytest.mark.skipif(hpu_place.LAZY, reason="of eager mode only")
on_the_cpu = pytest.mark.skipif(hpu_place.PLACE == "emulated", reason="shown on the stand-in")


class Rows(Dataset):
    """Rows that count, which a tiny model can learn."""

    def __len__(self):
        return 24

    def __getitem__(self, row):
        numbers = 3 + (row + torch.arange(10)) % 6
        return {"input_ids": numbers, "attention_mask": torch.ones_like(numbers), "labels": numbers}


COMPILED = []  # the number of nodes of each graph that the compiler was given


def hpu_backend(graph, examples, **options):
    """Stands for the vendor's compiler."""
    from torch._dynamo.backends.debugging import aot_eager

    COMPILED.append(len(graph.graph.nodes))
    return aot_eager(graph, examples)


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """The Gaudi backend; on the stand-in its device is the CPU, as optimum-habana's is then."""
    if hpu_place.PLACE == "standin":
        monkeypatch.setattr(HPUBackend, "why_unavailable", classmethod(lambda cls: None))
        monkeypatch.setattr(HPUBackend, "device", lambda self, index=None: torch.device("cpu"))
    if hpu_place.LAZY:
        return paca.set_backend("hpu")
    torch._dynamo.reset()
    if "hpu_backend" not in torch._dynamo.list_backends(()):
        torch._dynamo.register_backend(hpu_backend, name="hpu_backend")
    return paca.set_backend("hpu", graph="compile")


def arguments(folder, **given):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-2,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **paca.get_backend().training_arguments(),
    }
    return paca.training_arguments_class()(output_dir=str(folder), **{**settings, **given})


def model_for(**given):
    """Made after the arguments: those exchange transformers' classes."""
    return adapted(llama(attn_implementation="eager", use_cache=False), **given)


def trainer_for(folder, callbacks=(), **given):
    args = arguments(folder, **given)
    model = model_for()
    return paca.trainer_class()(model=model, args=args, train_dataset=Rows(), callbacks=list(callbacks))


def loss_of(trainer):
    batch = {name: torch.stack([Rows()[row][name] for row in range(4)]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        loss = trainer.model.eval()(**{k: v.to(trainer.args.device) for k, v in batch.items()}).loss.item()
    trainer.model.train()  # the columns are written again when the mode changes
    return loss


def deltas(model):
    return [delta.detach().cpu() for layer in layers_of(model) for delta in layer.paca_delta.values()]


def same(found, wanted):
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def marks(recorder, steps):
    """Pauses the recorder when the last step has ended."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            recorder.cut()  # what came before the first step is no part of it

        def on_step_end(self, *args, **kwargs):
            recorder.end_step()
            if len(recorder.steps) == steps:
                recorder.pause()

    return Marks()


def recorded(trainer, steps, stack):
    """Record a training, cut where the vendor's `mark_step` is called."""
    from habana_frameworks.torch import calls

    recorder = GraphRecorder(trainer.model)
    trainer.add_callback(marks(recorder, steps))
    stack.enter_context(calls.listening(lambda name, facts: recorder.cut() if name == "mark_step" else None))
    stack.enter_context(recorder.watching())
    return recorder


def test_it_is_the_real_one_on_the_expected_device(tmp_path):
    from optimum.habana import GaudiTrainer
    from optimum.habana.version import __version__

    trainer = trainer_for(tmp_path)
    assert isinstance(trainer, GaudiTrainer)
    assert __version__ == "1.21.2"
    assert type(trainer.model.base_model.model.model).forward.__module__.startswith("optimum.habana")
    assert trainer.args.device.type == ("hpu" if hpu_place.PLACE == "emulated" else "cpu")
    assert trainer.args.use_lazy_mode is hpu_place.LAZY


@lazy_only
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_twenty_steps_compile_nothing_after_the_first_and_stop_nowhere(tmp_path, checkpointing, bf16):
    trainer = trainer_for(tmp_path, max_steps=20, gradient_checkpointing=checkpointing, bf16=bf16)
    before = loss_of(trainer)
    with ExitStack() as stack:
        recorder = recorded(trainer, 20, stack)
        trainer.train()
    print("\n".join(recorder.report()))
    assert recorder.compilations[1:] == [0] * 19
    assert recorder.offences == []
    assert recorder.is_clean  # and each weight was written once a step, right after the optimizer
    assert type(trainer.optimizer.optimizer).__name__ == "FusedAdamW"
    assert loss_of(trainer) < 0.9 * before
    paca.verify(trainer.model)


@lazy_only
def test_the_columns_are_a_graph_of_their_own_after_the_optimizers(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=3)
    with ExitStack() as stack:
        recorder = recorded(trainer, 3, stack)
        trainer.train()
    *_, optimizer, write = recorder.steps[-1].graphs
    assert any("optimizer_adamw" in operation.name for operation in optimizer)
    assert sum("index_copy_" in operation.name for operation in write) == len(layers_of(trainer.model))
    assert not any("mm" in operation.name or "optimizer" in operation.name for operation in write)


@lazy_only
def test_a_planted_item_a_mask_and_a_ragged_batch_are_reported_of_gaudi_trainer_too(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=3, gradient_accumulation_steps=1)

    def plant(module, args, out):
        if out.sum().item() == 0:  # a sync
            return None
        return out + 0 * out[out > 0].sum()  # a shape that depends on data

    trainer.model.base_model.model.model.norm.register_forward_hook(plant)
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: step(
        model, {k: v[:1] for k, v in inputs.items()} if len(recorder.steps) == 2 else inputs, *rest
    )
    with ExitStack() as stack:
        recorder = recorded(trainer, 3, stack)
        trainer.train()
    assert {"host sync", "boolean mask as an index"} <= {offence.kind for offence in recorder.offences}
    assert any("test_gaudi_trainer.py" in o.where for o in recorder.offences if o.kind == "host sync")
    assert recorder.compilations[2] > 0
    line = next(line for line in recorder.report() if line.startswith("step 3:"))
    assert "[1, 10]" in line or "test_gaudi_trainer.py" in line  # on the device the cut itself is the first difference


@eager_only
def test_compile_mode_compiles_once_without_graph_breaks_and_learns(tmp_path):
    from torch._dynamo.utils import counters
    from transformers import TrainerCallback

    COMPILED.clear()
    counters.clear()
    after = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            after.append(len(COMPILED))

    trainer = trainer_for(tmp_path, [Count()], max_steps=20)
    before = loss_of(trainer)
    trainer.train()
    assert COMPILED
    assert after == [after[0]] * 20
    assert dict(counters["graph_break"]) == {}
    assert loss_of(trainer) < 0.9 * before
    paca.verify(trainer.model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, checkpointing):
    given = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": checkpointing}
    whole = trainer_for(tmp_path / "whole", **given)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert bool(COMPILED) is not hpu_place.LAZY
    assert resumed.state.global_step == 4
    assert same(deltas(resumed.model), deltas(whole.model))


def test_merging_leaves_what_was_trained_and_unloading_what_was_pretrained(tmp_path):
    base = weights_of(llama(attn_implementation="eager", use_cache=False))
    trainer = trainer_for(tmp_path)
    trainer.train()
    model = trainer.model.cpu().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        trained = model(input_ids=tokens()).logits
        merged = model.merge_and_unload()
        assert torch.equal(merged(input_ids=tokens()).logits, trained)
    found = weights_of(other.unload())
    assert all(torch.equal(found[name], base[name]) for name in base)


@on_the_cpu
@lazy_only
def test_columns_are_written_before_an_hpu_graph_is_recorded(tmp_path):
    from habana_frameworks.torch import calls

    trainer = trainer_for(tmp_path, use_hpu_graphs_for_training=True)
    with torch.no_grad():
        for delta in (d for layer in layers_of(trainer.model) for d in layer.paca_delta.values()):
            delta.add_(0.5)  # what a load does: the weight does not hold it yet
    held = []

    def look(name, facts):
        if name == "ModuleCacher":
            held.append(all(layer.adapted._is_written(layer.held_adapters()) for layer in layers_of(trainer.model)))

    with calls.listening(look):
        trainer.train()
    assert held == [True]


@on_the_cpu
@lazy_only
def test_hpu_graphs_are_recorded_of_a_model_without_adapters_too(tmp_path):
    from habana_frameworks.torch import calls

    args = arguments(tmp_path, use_hpu_graphs_for_training=True, max_steps=1)
    model = llama(attn_implementation="eager", use_cache=False)
    recorded = calls.count("ModuleCacher")
    paca.trainer_class()(model=model, args=args, train_dataset=Rows()).train()
    assert calls.count("ModuleCacher") == recorded + 1


@on_the_cpu
def test_fp8_is_refused_before_it_replaces_the_layers(tmp_path):
    args = arguments(tmp_path)
    args.fp8 = True
    with pytest.raises(ValueError, match="fp8=True lets optimum-habana replace"):
        paca.trainer_class()(model=model_for(), args=args, train_dataset=Rows())


@on_the_cpu
def test_a_lazy_mode_that_the_process_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"needs PT_HPU_LAZY_MODE={1 - hpu_place.LAZY} in the environment"):
        arguments(tmp_path, use_lazy_mode=not hpu_place.LAZY)


@pytest.fixture
def recipe(tmp_path):
    """A recipe for a tiny model; its `gaudi:` section comes last."""
    import json

    from tiny_models import tokenizer

    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": " ".join(f"w{3 + (row + place) % 6}" for place in range(20))} for row in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ntrain_file: {tmp_path / 'rows.jsonl'}\neval_size: 4\n"
        f"output_dir: {tmp_path / 'out'}\nbackend: hpu\nr: 4\npaca_alpha: 8\nlearning_rate: 0.05\nmax_length: 16\n"
        "per_device_train_batch_size: 2\nmax_steps: 8\npacking: true\nattn_implementation: eager\n"
        "gaudi:\n  throughput_warmup_steps: 2\n  use_fused_clip_norm: false\n"
    )
    return str(tmp_path / "my.yaml")


@on_the_cpu
def test_a_recipe_trains_through_gaudi_trainer_with_its_gaudi_section(tmp_path, recipe, capsys):
    import json

    from habana_frameworks.torch import calls

    from paca.cli import main

    clipped = calls.count("fused_clip_norm")
    assert main(["train", recipe]) == 0
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert found["eval_loss"] < found["eval_before_loss"]
    assert calls.count("fused_clip_norm") == clipped
    assert "throughput_warmup_steps: 2" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert main(["train", recipe, "--gaudi", "{use_lazy_mod: true}"]) == 2
    assert "gaudi: takes keys of GaudiTrainingArguments, found 'use_lazy_mod'" in capsys.readouterr().err
    assert os.environ["PT_HPU_LAZY_MODE"] == str(int(hpu_place.LAZY))


@on_the_cpu
@lazy_only
def test_the_doctor_prints_the_vendors_count_beside_its_own_and_goes_by_both(recipe, capsys):
    from habana_frameworks.torch import calls

    from paca.cli import main

    command = ["doctor", "--graphs", recipe, "--steps", "4"]
    waited = calls.count("synchronize")
    assert main(command) == 0
    assert calls.count("synchronize") >= waited + 4  # graphs are compiled while the host goes on
    assert "compiled, by the vendor  0, 0, 0, 0 in steps 1 to 4" in capsys.readouterr().out

    def compile_anew(name, facts):
        if name == "optimizer_adamw":
            calls.note("graph_compilation")

    with calls.listening(compile_anew):
        assert main(command) == 2
    said = capsys.readouterr()
    assert "compiled, by the vendor  1, 1, 1, 1 in steps 1 to 4" in said.out
    assert "compiled after that      0" in said.out
