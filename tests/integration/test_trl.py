"""TRL's trainers take a `PacaConfig` where they take a `LoraConfig`."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaForCausalLM

import paca
from paca.layer import PacaLayer

trl = pytest.importorskip("trl")

# TRL names arguments as transformers did before it renamed them, and warns of features it will change.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def words(row: int, length: int) -> str:
    return " ".join(f"w{int(i)}" for i in tiny.tokens(1, length, seed=row)[0] if i < 63)


def arguments(folder, **given):
    return {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "dataset_num_proc": None,
        **given,
    }


def supervised(folder, model=None, **given):
    """An SFTTrainer, trained."""
    trainer = trl.SFTTrainer(
        model=model or tiny.llama(),
        args=trl.SFTConfig(**arguments(folder, max_length=16, **given)),
        train_dataset=Dataset.from_dict({"text": [words(row, 5 + row % 7) for row in range(12)]}),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.config(),
    )
    trainer.train()
    return trainer


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trains_a_paca_adapter_from_its_config(tmp_path):
    trainer = supervised(tmp_path, gradient_checkpointing=False)
    assert isinstance(trainer.model, PeftModel)
    assert type(trainer.model.base_model) is paca.PacaModel
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    paca.verify(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert torch.equal(tiny.logits(loaded), tiny.logits(trainer.model))
    assert tiny.same_bits(tiny.weights_of(trainer.model.unload()), tiny.weights_of(tiny.llama()))


@pytest.mark.parametrize("bits", [4, 8])
def test_sft_trains_on_a_base_that_it_loads_quantised(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny.llama().save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    how = {"quantization_config": quantised, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    trainer = supervised(
        tmp_path, str(tmp_path / "base"), model_init_kwargs=how, optim="adamw_8bit", gradient_checkpointing=True
    )
    trained = [module for module in trainer.model.modules() if isinstance(module, PacaLayer)]
    assert {layer.residency for layer in trained} == {"quantised"}
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base", **how)
    assert torch.equal(
        tiny.logits(PeftModel.from_pretrained(again, tmp_path / "saved").eval()), tiny.logits(trainer.model.eval())
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_sft_with_packing_and_gradient_checkpointing_trains_as_without_checkpointing(tmp_path, reentrant):
    packing = {"packing": True, "packing_strategy": "wrapped"}
    plain = supervised(tmp_path / "plain", gradient_checkpointing=False, **packing)
    recomputed = supervised(
        tmp_path / "recomputed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        **packing,
    )
    assert {len(row["input_ids"]) for row in list(plain.train_dataset)[:-1]} == {16}
    assert losses_of(recomputed) == losses_of(plain)
    assert losses_of(plain)[-1] < losses_of(plain)[0]
    assert torch.equal(tiny.logits(recomputed.model), tiny.logits(plain.model))


def test_dpo_without_a_reference_model_uses_the_disabled_adapter_as_reference(tmp_path):
    rows = {
        "prompt": [words(row, 4) for row in range(8)],
        "chosen": [" " + words(100 + row, 5) for row in range(8)],
        "rejected": [" " + words(200 + row, 5) for row in range(8)],
    }
    trainer = trl.DPOTrainer(
        model=tiny.llama(),
        args=trl.DPOConfig(**arguments(tmp_path, gradient_checkpointing=False, max_length=32, learning_rate=0.1)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.config(),
    )
    assert trainer.ref_model is None
    trainer.train()
    # An untrained policy equals its reference: the first loss is -log σ(0), and no reward parts the two.
    assert losses_of(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses_of(trainer)[-1] < 0.68
    with trainer.model.disable_adapter():
        assert torch.equal(tiny.logits(trainer.model), tiny.logits(tiny.llama()))
    assert not torch.equal(tiny.logits(trainer.model), tiny.logits(tiny.llama()))
    assert tiny.same_bits(tiny.weights_of(trainer.model.unload()), tiny.weights_of(tiny.llama()))
