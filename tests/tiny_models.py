"""Random models of a few thousand weights, and the data to train them; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import paca
from paca.layer import PacaLayer

VOCABULARY = 64
# What transformers calls gradient checkpointing; it was renamed in version 5.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A Llama of two layers: 32 wide, 64 in the MLP."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 of two layers; its linears are Conv1D, its head is tied."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


class MLP(nn.Module):
    """Two linears with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, 10) to (…, 4)."""
        return self.last(torch.tanh(self.first(x)))


def mlp(seed: int = 0) -> MLP:
    """The MLP, the same each time."""
    torch.manual_seed(seed)
    return MLP()


def tokens(rows: int = 3, length: int = 9, seed: int = 5) -> torch.Tensor:
    """Random token numbers, (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def config(**given: Any) -> paca.PacaConfig:
    """Rank 4 with a scale of 2 on every linear, unless told otherwise."""
    return paca.PacaConfig(
        **{"r": 4, "paca_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **given}
    )


def adapted(base: nn.Module, adapter_name: str = "default", **given: Any) -> Any:
    """The model with a fresh adapter."""
    return get_peft_model(base, config(**given), adapter_name=adapter_name)


def perturb(model: nn.Module, adapter_name: str = "default", seed: int = 3, std: float = 0.05) -> Any:
    """Set the deltas of an adapter to random values, as training would; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            if adapter_name in layer.paca_delta:
                delta = layer.paca_delta[adapter_name]
                delta.copy_(torch.randn(delta.shape, generator=generator) * std)
    return model


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """Train a causal language model a few steps on one batch; returns the losses."""
    was_training = model.training
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.train(was_training)
    return losses


def recompute(model: Any, reentrant: bool) -> Any:
    """Turn on gradient checkpointing; returns the model."""
    model.enable_input_require_grads()
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    return model


@torch.no_grad()
def logits(model: nn.Module, training: bool = False) -> torch.Tensor:
    """What the model says to the one batch."""
    was_training = model.training
    model.train(training)
    result: torch.Tensor = model(input_ids=tokens()).logits
    model.train(was_training)
    return result


def layers_of(model: nn.Module) -> list[PacaLayer]:
    """Every PaCA layer of a model."""
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter as it lies in memory, by its name in the base model."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".paca_" not in name and ".lora_" not in name
    }


def same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names, dtypes and values."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w3 … w63."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY - 1)}
    words["<unk>"] = VOCABULARY - 1
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
