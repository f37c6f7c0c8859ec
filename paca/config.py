"""The configuration of a PaCA adapter, saved beside it as `adapter_config.json`."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType

from paca.select import MASKS, SELECTIONS

RESIDENCIES = ("auto", "resident", "swap")
STARTS = ("loaded", "checkpoint")
BIASES = ("none", "all", "paca_only")


class PacaPeftType(str, enum.Enum):
    """PEFT's name for the method.

    A str enum of ours equals PEFT's own member wherever PEFT has one, and unpickles by importing paca.
    """

    PACA = "PACA"


PEFT_TYPE: Any = getattr(PeftType, "PACA", PacaPeftType.PACA)


@dataclass
class PacaConfig(PeftConfig):
    """Settings of a PaCA adapter.

    Names are those of PEFT's own PaCA and of `LoraConfig`; files are interchangeable with the former.

    Args:
        r: number of input columns trained in each targeted weight, 1 … in_features.
        paca_alpha: the update is scaled by `paca_alpha / r`.
        target_modules: names or suffixes of the layers to adapt, a regular expression, or "all-linear".
        exclude_modules: names, suffixes or a regular expression of layers to leave out.
        layers_to_transform: adapt only these layer numbers.
        layers_pattern: name of the list that holds the layers, if it is not a usual one.
        rank_pattern: another `r` for the modules whose name ends in the key (a regular expression), as in `LoraConfig`.
        alpha_pattern: another `paca_alpha`, likewise.
        fan_in_fan_out: accepted for compatibility; a Conv1D is recognised by its type.
        bias: which biases train: "none", "all" or "paca_only" (those of adapted layers).
        modules_to_save: other modules that train in full and are saved with the adapter.
        init_weights: start from zero, so that the adapted model equals the base model; False is for tests.
        random_seed: seed of the column choice, with each module's name.
        selection: how columns are chosen: "random" (the paper), "weight_norm" (largest), or by a calibration pass
            (`paca.calibrate`) "activation_norm_large", "activation_norm_small", "gradient_norm"; or "s2ft": whole heads
            and channels, drawn over all layers together (`paca.s2ft`); or single entries instead of columns, as many as
            r columns have (`paca.masked`): "mask_random", "mask_magnitude" (largest |w|), or by a calibration pass
            "mask_gradient" (largest |g|), "mask_snip" (largest |w·g|).
        copermute: with selection "s2ft", reorder heads and channels of the base model so that the trained columns lie
            side by side (`paca.permutation`).
        prefix_training: {"min": b, "max": b'}: each step trains the first columns only, how many is drawn anew, so that
            any prefix of the adapter is an adapter (DyLoRA); see docs/family.md for this and the next three.
        groups: so many disjoint groups of columns, one of which trains in each step (MoSA).
        reselect: every so many steps, or "epoch" for every epoch, give up the quarter of the columns that moved least
            for others.
        group_lasso: strength of a penalty under which whole layers drop out (GS-LoRA).
        warmup_adapter: a saved adapter, whose largest changes `selection="largest_change"` takes.
        columns: columns chosen by hand, module name (or suffix) → column numbers; wins over `selection`. Not saved: the
            adapter file has them. With a mask, numbers of entries, row · width + column in the weight as it is.
        share_columns: let layers that read the same input (q/k/v, gate/up) train the same columns, so that one gather
            serves them.
        residency: "resident": the weight holds the columns between steps; "swap": they are put in around each GEMM;
            "auto": resident wherever the weight can hold them.
        start_from: "loaded": a new adapter changes nothing; "checkpoint": on a quantised base its columns start from
            the values that the checkpoint has for them, not from the dequantised ones.
        check_base: refuse to load onto another base model than the adapter was trained on.
        base_fingerprint: what `check_base` compares with; written when the adapter is saved.
    """

    r: int = field(default=8, metadata={"help": "trained input columns per weight"})
    paca_alpha: int = field(default=8, metadata={"help": "the update is scaled by paca_alpha / r"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "layers to adapt: names, a regex, or 'all-linear'"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "layers to leave out: names or a regex"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "adapt only these layer numbers"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list that holds the layers"}
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "module name or regex -> another r"})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "module name or regex -> another paca_alpha"}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "for compatibility; Conv1D is recognised by its type"}
    )
    bias: Literal["none", "all", "paca_only"] = field(
        default="none", metadata={"help": "biases to train: none, all or paca_only"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained in full and saved with the adapter"}
    )
    init_weights: bool = field(default=True, metadata={"help": "start from the base model"})
    random_seed: int | None = field(default=0, metadata={"help": "seed of the column choice"})
    selection: str = field(default="random", metadata={"help": f"how columns are chosen: {', '.join(SELECTIONS)}"})
    copermute: bool = field(
        default=False, metadata={"help": "put the trained heads and channels side by side (selection s2ft)"}
    )
    prefix_training: dict[str, int] | None = field(
        default=None, metadata={"help": "train random prefixes of min to max columns"}
    )
    groups: int | None = field(default=None, metadata={"help": "groups of columns, one trained a step"})
    reselect: int | Literal["epoch"] | None = field(
        default=None, metadata={"help": "steps between choices of new columns, or epoch"}
    )
    group_lasso: float = field(default=0.0, metadata={"help": "penalty under which whole layers drop out"})
    warmup_adapter: str | None = field(default=None, metadata={"help": "a saved adapter for selection largest_change"})
    columns: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "columns chosen by hand, module name -> numbers"}
    )
    share_columns: bool = field(
        default=True, metadata={"help": "one column choice for layers that read the same input"}
    )
    residency: str = field(default="auto", metadata={"help": f"where trained columns live: {', '.join(RESIDENCIES)}"})
    start_from: str = field(
        default="loaded", metadata={"help": "columns of a quantised base start as loaded, or from its checkpoint"}
    )
    check_base: bool = field(default=True, metadata={"help": "refuse to load onto another base model"})
    base_fingerprint: dict[str, str] | None = field(default=None, metadata={"help": "written on save"})

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ValueError: naming the field, what was found and what is possible.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for name, rank in {
            "r": self.r,
            **{f"rank_pattern[{k!r}]": v for k, v in (self.rank_pattern or {}).items()},
        }.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"`{name}` must be a whole number greater than 0, found {rank!r}")
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("residency", self.residency, RESIDENCIES)
        _one_of("start_from", self.start_from, STARTS)
        _one_of("bias", self.bias, BIASES)
        if self.copermute and self.selection != "s2ft":
            raise ValueError(f"`copermute` needs selection='s2ft', found {self.selection!r}")
        self._check_schedules()
        self._check_mask()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def _check_schedules(self) -> None:
        if (prefix := self.prefix_training) is not None:
            whole = sorted(prefix) == ["max", "min"] and all(type(b) is int for b in prefix.values())
            if not whole or not 1 <= prefix["min"] <= prefix["max"] <= self.r:
                raise ValueError(f"`prefix_training` must be {{min: b, max: b'}} with 1 ≤ b ≤ b' ≤ r, found {prefix!r}")
        if self.groups is not None and not (type(self.groups) is int and 2 <= self.groups <= self.r):
            raise ValueError(f"`groups` must be a whole number from 2 to r = {self.r}, found {self.groups!r}")
        steps = isinstance(self.reselect, int) and not isinstance(self.reselect, bool) and self.reselect >= 1
        if self.reselect not in (None, "epoch") and not steps:
            raise ValueError(f"`reselect` must be a number of steps, at least 1, or 'epoch'; found {self.reselect!r}")
        if not isinstance(self.group_lasso, int | float) or not 0 <= self.group_lasso < math.inf:
            raise ValueError(f"`group_lasso` must be a number, finite and not negative; found {self.group_lasso!r}")
        if self.groups is not None and self.prefix_training is not None:
            raise ValueError("`groups` and `prefix_training` both say which columns train in a step; choose one")
        if (self.selection == "largest_change") != (self.warmup_adapter is not None):
            raise ValueError(
                "`warmup_adapter` and selection='largest_change' need each other: the columns come from it"
            )

    @property
    def masked(self) -> bool:
        """Whether single entries train instead of columns."""
        return self.selection in MASKS

    def _check_mask(self) -> None:
        for option in ("prefix_training", "groups", "reselect") if self.masked else ():
            if getattr(self, option) is not None:
                raise ValueError(
                    f"`{option}` is about columns, and selection={self.selection!r} trains single entries; use one of "
                    "the two"
                )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does; of `columns` only that they were chosen: the adapter file has them.

        The fingerprint goes to the file alone: a config object may be used again, for other columns.
        """
        chosen, self.columns = self.columns, None if self.columns is None else {}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.columns, self.base_fingerprint = chosen, None


def settings(config: PeftConfig) -> PacaConfig:
    """Return a config as ours: one made by PEFT's own PaCA lacks the options that only we have."""
    if isinstance(config, PacaConfig):
        return config
    known = PacaConfig.__dataclass_fields__
    return PacaConfig(**{name: value for name, value in vars(config).items() if name in known and known[name].init})


def _one_of(name: str, value: object, known: tuple[str, ...] | Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}; found {value!r}")
