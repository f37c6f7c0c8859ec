"""Plain `transformers.Trainer` trains a PaCA model with no callback of ours."""

from __future__ import annotations

import math

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import paca


class Rows(Dataset):
    """Random sequences of one length."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.ids = tiny.tokens(rows, 12, seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i], "attention_mask": torch.ones_like(self.ids[i])}


def trainer_of(model, folder, **given) -> Trainer:
    """A Trainer with its own defaults as far as they do not slow the tests down."""
    rows, callbacks = given.pop("rows", 16), given.pop("callbacks", None)
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **given,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Rows(rows),
        eval_dataset=Rows(8, seed=1),
        callbacks=callbacks,
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(folder, model=None, **given):
    """A model trained by the Trainer, in evaluation mode, and the Trainer."""
    trainer = trainer_of(tiny.adapted(tiny.llama()) if model is None else model, folder, **given)
    trainer.train()
    return trainer.model.eval(), trainer


def same_adapter(one, two) -> bool:
    return tiny.same_bits(get_peft_model_state_dict(one), get_peft_model_state_dict(two))


def test_the_default_trainer_with_its_fused_optimizer_trains_like_lora_with_frozen_one_hot_rows(tmp_path):
    """An oracle that shares none of our code; a stale column would part the two at the second step."""
    config, tensors = paca.convert_to_lora(tiny.adapted(tiny.llama()))
    lora = get_peft_model(tiny.llama(), config)
    set_peft_model_state_dict(lora, tensors)
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_(".lora_B." in name)
    model, ours = trained(tmp_path / "ours")
    _, theirs = trained(tmp_path / "theirs", lora)
    assert "fused" in ours.args.optim
    assert ours.optimizer.optimizer.param_groups[0]["fused"]
    assert losses_of(ours)[-1] < losses_of(ours)[0]
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-5)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(lora), atol=1e-4, rtol=1e-4)
    paca.verify(model)


def test_no_callback_is_ours(tmp_path):
    _, trainer = trained(tmp_path, max_steps=1)
    assert trainer.callback_handler.callbacks
    assert not any(type(callback).__module__.startswith("paca") for callback in trainer.callback_handler.callbacks)


def test_training_leaves_the_base_weights_as_they_were(tmp_path):
    model, _ = trained(tmp_path)
    assert not torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
    assert tiny.same_bits(tiny.weights_of(model.unload()), tiny.weights_of(tiny.llama()))


@pytest.mark.parametrize("accumulated", [2, 4])
def test_accumulated_batches_train_like_one_large_batch(tmp_path, accumulated):
    whole, _ = trained(tmp_path / "whole", per_device_train_batch_size=4)
    parts, trainer = trained(
        tmp_path / "parts", per_device_train_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated
    )
    assert trainer.state.global_step == 6
    torch.testing.assert_close(tiny.logits(parts), tiny.logits(whole), atol=1e-4, rtol=1e-3)
    paca.verify(parts)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_either_kind_changes_nothing(tmp_path, reentrant):
    plain, _ = trained(tmp_path / "plain")
    model = tiny.adapted(tiny.llama())
    model.enable_input_require_grads()
    name = tiny.CHECKPOINTING
    given = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
    recomputed, _ = trained(tmp_path / "recomputed", model, **given)
    assert same_adapter(recomputed, plain)


def test_evaluating_in_the_middle_changes_nothing_and_sees_the_last_step(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        """Evaluates a merged copy whenever the Trainer evaluates the live model."""

        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            plain = tiny.llama()
            with torch.no_grad():
                for layer in tiny.layers_of(model):
                    plain.get_parameter(f"{layer.name}.weight").add_(layer.get_delta_weight("default"))
                rows = Rows(8, seed=1).ids
                seen.append((metrics["eval_loss"], plain.eval()(input_ids=rows, labels=rows).loss.item()))

    plain, _ = trained(tmp_path / "plain")
    watched, _ = trained(
        tmp_path / "watched", eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8, callbacks=[Watch()]
    )
    assert same_adapter(watched, plain)
    assert len(seen) == 6
    assert len({round(live, 4) for live, _ in seen}) == 6
    for live, merged in seen:
        assert live == pytest.approx(merged, rel=1e-5)


@pytest.mark.parametrize("other_columns", [False, True], ids=["same seed", "another seed"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, other_columns):
    """The checkpoint brings its columns along, whatever the fresh model drew."""
    whole, through = trained(tmp_path / "whole", save_strategy="steps", save_steps=3)
    fresh = tiny.adapted(tiny.llama(), random_seed=99 if other_columns else 0)
    trainer = trainer_of(fresh, tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert same_adapter(trainer.model, whole)
    assert losses_of(trainer)[-3:] == losses_of(through)[-3:]
    assert torch.equal(tiny.logits(trainer.model), tiny.logits(whole))
    assert tiny.same_bits(tiny.weights_of(trainer.model.unload()), tiny.weights_of(tiny.llama()))


def test_the_best_model_is_loaded_at_the_end_and_acts(tmp_path):
    """The learning rate is so high that the last step is not the best."""
    model, trainer = trained(
        tmp_path,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(history) == 6
    assert min(history) < history[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(history), rel=1e-6)
    best = PeftModel.from_pretrained(tiny.llama(), trainer.state.best_model_checkpoint)
    assert torch.equal(tiny.logits(model), tiny.logits(best))


def test_a_saved_model_is_its_adapter(tmp_path):
    model, trainer = trained(tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("model*.safetensors"))
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")), tiny.logits(model))


def test_bfloat16_autocast_trains_float32_deltas(tmp_path):
    model, trainer = trained(tmp_path, bf16=True)
    assert {layer.paca_delta["default"].dtype for layer in tiny.layers_of(model)} == {torch.float32}
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    paca.verify(model)


def test_weight_averaging_by_the_user_is_seen(tmp_path):
    """Values copied in between training and evaluation, as averaging does."""
    model, trainer = trained(tmp_path)
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        for layer in tiny.layers_of(model):
            layer.paca_delta["default"].zero_()
    after = trainer.evaluate()["eval_loss"]
    base = trainer_of(tiny.adapted(tiny.llama()), tmp_path / "base").evaluate()["eval_loss"]
    assert after == base != before
    assert math.isfinite(after)
