"""The ways to switch between two adapters that are measured against each other, each with a model of its own."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import paca
from paca.bench import stack
from paca.bench.shapes import Shape, matching_lora_rank

RANK = 8  # of PaCA, its default; LoRA gets the rank that trains as many parameters
ADAPTERS = ("first", "second")


class Way(ABC):
    """A model with two adapters, and how to change from one to the other.

    Args:
        shape: sizes of the model.
        dtype: of its weights.
        device: where it is.
        seed: of its weights; the adapters' values are random, too.
    """

    label: ClassVar[str]

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        base = stack.build(shape, dtype, device, seed).eval()
        self.base = base.requires_grad_(False)
        self.rank = RANK
        self.adapter_parameters = 0
        self.model: Any = base
        self.prepare(shape)

    @abstractmethod
    def prepare(self, shape: Shape) -> None:
        """Add the two adapters; the first is in use afterwards."""

    @abstractmethod
    def switch(self, name: str) -> None:
        """Use another adapter."""

    @abstractmethod
    def undo(self) -> None:
        """Go back to the base model."""

    def weights(self) -> Mapping[str, Tensor]:
        """Return the base model's parameters as they lie in memory, by their names there."""
        return {
            name.replace("base_model.model.", "").replace(".base_layer", ""): parameter
            for name, parameter in self.model.named_parameters()
            if ".paca_" not in name and ".lora_" not in name
        }

    def _add(self, config: Any) -> None:
        import peft

        with warnings.catch_warnings():  # PEFT 0.21 reads a property that transformers 5 has renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            self.model = peft.get_peft_model(self.base, config(ADAPTERS[0]), adapter_name=ADAPTERS[0])
            self.model.add_adapter(ADAPTERS[1], config(ADAPTERS[1]))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".paca_delta." in name or ".lora_" in name:
                    values = torch.randn(parameter.shape, generator=generator) * 0.02
                    parameter.copy_(values)
                    self.adapter_parameters += parameter.numel() if ADAPTERS[0] in name else 0
        self.model.set_adapter(ADAPTERS[0], inference_mode=True)
        paca.refresh(self.model)


def _paca_config(name: str, same_columns: bool = False) -> paca.PacaConfig:
    seed = 0 if same_columns else ADAPTERS.index(name)
    return paca.PacaConfig(r=RANK, paca_alpha=RANK, target_modules="all-linear", random_seed=seed)


class PacaPeft(Way):
    """`set_adapter` of a PEFT model with PaCA adapters of other columns."""

    label = "PaCA, PEFT's set_adapter"

    def prepare(self, shape: Shape) -> None:
        """Add the two adapters."""
        self._add(_paca_config)

    def switch(self, name: str) -> None:
        """Write the columns that differ."""
        self.model.set_adapter(name, inference_mode=True)

    def undo(self) -> None:
        """Restore the pretrained columns."""
        self.model.base_model.disable_adapter_layers()


class PacaBank(Way):
    """`AdapterBank.swap` on a plain model, adapters of other columns."""

    label = "PaCA, AdapterBank.swap"
    same_columns: ClassVar[bool] = False

    def prepare(self, shape: Shape) -> None:
        """Draw both adapters and prefetch them."""
        from paca.saved import SavedAdapter, SavedLayer
        from paca.select import random_columns, shared_name

        self.bank = paca.AdapterBank(self.base)
        generator = torch.Generator().manual_seed(1)
        for name in ADAPTERS:
            config = _paca_config(name, self.same_columns)
            layers = {
                path: SavedLayer(
                    random_columns(module.in_features, RANK, config.random_seed or 0, shared_name(path)),
                    torch.randn(module.out_features, RANK, generator=generator) * 0.02,
                    1.0,
                )
                for path, module in self.base.named_modules()
                if isinstance(module, nn.Linear)
            }
            self.bank.load(name, SavedAdapter(config, layers))
            self.bank.prefetch(name)
        self.adapter_parameters = sum(layer.delta.numel() for layer in layers.values())
        self.bank.swap(ADAPTERS[0])

    def switch(self, name: str) -> None:
        """Write the columns that differ."""
        self.bank.swap(name)

    def undo(self) -> None:
        """Restore the pretrained columns."""
        self.bank.swap(None)


class PacaBankSameColumns(PacaBank):
    """The same with adapters that train the same columns, as adapters of one seed do."""

    label = "PaCA, AdapterBank.swap, one seed"
    same_columns = True


class _Lora(Way):
    def prepare(self, shape: Shape) -> None:
        """Add the two adapters."""
        from peft import LoraConfig

        self.rank = matching_lora_rank(shape, RANK)
        self._add(lambda _: LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules="all-linear"))

    def undo(self) -> None:
        """Leave the adapter out."""
        self.model.base_model.disable_adapter_layers()


class LoraFused(_Lora):
    """PEFT's LoRA, fused into the weights so that a forward costs what the base model's costs."""

    label = "LoRA, unfuse and fuse"

    def prepare(self, shape: Shape) -> None:
        """Add the two adapters and fuse the first."""
        super().prepare(shape)
        self.model.merge_adapter()

    def switch(self, name: str) -> None:
        """Subtract the old product, add the new one."""
        self.model.unmerge_adapter()
        self.model.set_adapter(name, inference_mode=True)
        self.model.merge_adapter()

    def undo(self) -> None:
        """Subtract the product."""
        self.model.unmerge_adapter()
        super().undo()


class LoraHotswapped(_Lora):
    """PEFT's hot-swap: another adapter's values are copied over the first one's; each forward pays for the branch."""

    label = "LoRA, hot-swap"

    def prepare(self, shape: Shape) -> None:
        """Add the two adapters and keep copies of their values."""
        super().prepare(shape)
        self.values = {
            adapter: {
                name.replace(f".{adapter}.", f".{ADAPTERS[0]}."): parameter.detach().clone()
                for name, parameter in self.model.named_parameters()
                if f".{adapter}." in name
            }
            for adapter in ADAPTERS
        }
        self.model.delete_adapter(ADAPTERS[1])

    def switch(self, name: str) -> None:
        """Copy the other values."""
        from peft.utils.hotswap import hotswap_adapter_from_state_dict

        config = self.model.peft_config[ADAPTERS[0]]
        hotswap_adapter_from_state_dict(self.model, self.values[name], ADAPTERS[0], config)


class LoraUnfused(_Lora):
    """`set_adapter` of PEFT's LoRA: nothing is copied; each forward pays for the branch."""

    label = "LoRA, PEFT's set_adapter"

    def switch(self, name: str) -> None:
        """Turn to the other branch."""
        self.model.set_adapter(name, inference_mode=True)


WAYS: dict[str, type[Way]] = {
    "paca-bank": PacaBank,
    "paca-bank-same-columns": PacaBankSameColumns,
    "paca-set-adapter": PacaPeft,
    "lora-fuse": LoraFused,
    "lora-hot-swap": LoraHotswapped,
    "lora-set-adapter": LoraUnfused,
}
REFERENCE = "lora-fuse"
