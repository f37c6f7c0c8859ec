"""The methods that are compared: their names, and how each prepares a model for training."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paca.bench.shapes import Shape, matching_lora_rank

if TYPE_CHECKING:
    from torch import nn

FLOOR = "floor"
_FORM = re.compile(
    r"(?P<family>paca-unshared|paca-upstream|paca|lora-match-nocast|lora-match|lora-nocast|lora|dora|shira|miss)"
    r"-r(?P<rank>[1-9]\d*)"
)

FORMS = {
    "floor": "nothing trains, input gradients flow: what any method costs at least",
    "paca-rN": "PaCA, N columns a weight, one choice for layers that read the same input",
    "paca-unshared-rN": "PaCA with a choice of columns for each weight (share_columns=False)",
    "paca-upstream-rN": "PaCA as PEFT 0.22 does it: columns put in and taken out around each product",
    "lora-rN": "PEFT's LoRA of rank N, its defaults, dropout 0",
    "lora-match-rN": "the same at the rank that trains as many parameters as PaCA with r=N",
    "lora-nocast-rN": "LoRA of rank N with adapters in the weight's dtype (autocast_adapter_dtype=False)",
    "lora-match-nocast-rN": "both of these",
    "dora-rN": "PEFT's DoRA of rank N",
    "shira-rN": "PEFT's SHiRA with as many parameters as LoRA of rank N",
    "miss-rN": "PEFT's MiSS of rank N",
    "full": "every weight of the layers trains",
}


@dataclass(frozen=True)
class Method:
    """One way to train the stack.

    Attributes:
        name: as given on the command line, e.g. "lora-match-r8".
        family: the name without its rank.
        rank: as in the name, 0 for floor and full.
    """

    name: str
    family: str
    rank: int

    def rank_for(self, shape: Shape) -> int:
        """Return the rank that the adapter gets: the named one, or the one that matches PaCA's parameter count."""
        return matching_lora_rank(shape, self.rank) if "match" in self.family else self.rank

    def label(self, shape: Shape) -> str:
        """Name the method in a table."""
        rank = self.rank_for(shape)
        return {
            "floor": "frozen floor",
            "full": "full fine-tuning",
            "paca": f"PaCA r={rank}",
            "paca-unshared": f"PaCA r={rank}, unshared columns",
            "paca-upstream": f"PaCA r={rank}, PEFT 0.22's way",
            "shira": f"SHiRA r={rank}",
            "miss": f"MiSS r={rank}",
            "lora": f"LoRA r={rank}",
            "lora-match": f"LoRA r={rank} (parameters of PaCA r={self.rank})",
            "lora-nocast": f"LoRA r={rank}, weight's dtype",
            "lora-match-nocast": f"LoRA r={rank} (parameters of PaCA r={self.rank}), weight's dtype",
            "dora": f"DoRA r={rank}",
        }[self.family]

    def prepare(self, model: nn.Module, shape: Shape) -> nn.Module:
        """Make a model trainable by this method and return it, wrapped where the method wraps.

        Args:
            model: a stack from `paca.bench.stack.build`; used up.
            shape: its sizes.
        """
        model.requires_grad_(False)
        if self.family == FLOOR:
            return model
        if self.family == "full":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith("embed_tokens"))
            return model

        rank = self.rank_for(shape)
        if self.family == "paca-upstream":
            from paca.bench.upstream import adapt

            return adapt(model, rank)

        import peft

        from paca.config import PacaConfig

        config: peft.PeftConfig
        if self.family.startswith("paca"):
            config = PacaConfig(
                r=rank, paca_alpha=rank, target_modules="all-linear", share_columns=self.family == "paca"
            )
        elif self.family == "shira":
            config = peft.ShiraConfig(r=rank, target_modules="all-linear", random_seed=0)
        elif self.family == "miss":
            config = peft.MissConfig(r=rank, miss_dropout=0.0, target_modules="all-linear")
        else:
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=rank,
                lora_dropout=0.0,
                target_modules="all-linear",
                use_dora=self.family == "dora",
            )
        with warnings.catch_warnings():  # PEFT 0.21 reads a property that transformers 5 has renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            return peft.get_peft_model(model, config, autocast_adapter_dtype="nocast" not in self.family)


def parse_methods(names: str) -> tuple[Method, ...]:
    """Read a comma-separated list of method names; the floor is put first if it is missing.

    Raises:
        ValueError: naming the first name that is none, and the forms there are.
    """
    methods = [_parse(name.strip()) for name in names.split(",") if name.strip()]
    unique = {method.name: method for method in methods}
    return tuple({FLOOR: Method(FLOOR, FLOOR, 0), **unique}.values())


def _parse(name: str) -> Method:
    if name in (FLOOR, "full"):
        return Method(name, name, 0)
    if found := _FORM.fullmatch(name):
        return Method(name, found["family"], int(found["rank"]))
    raise ValueError(f"--methods: {name!r} is no method; known forms: {', '.join(FORMS)} (N is a rank, e.g. paca-r8)")
