"""The PEFT tuner: finds the targeted layers of a model and turns them into PaCA layers."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import accumulate
from numbers import Real
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from paca import freshness, s2ft
from paca.bank import refuse_held
from paca.columns import why_not_resident
from paca.compress import expanded
from paca.config import PacaConfig, settings
from paca.entries import from_file, padded, to_file
from paca.largest_change import largest_changes
from paca.layer import AdaptedLinear, PacaLayer, in_out_features
from paca.masked import MaskedLinear
from paca.mixing import mixed_batch
from paca.original import start_from_checkpoint
from paca.permutation import copermute
from paca.quantised import (
    QuantisedWeight,
    base_weight,
    forget_quantisation,
    has_quantised_layers,
    is_noted_quantised,
    is_of_own_class,
    library_of,
)
from paca.registry import get_backend
from paca.schedule import schedules_of
from paca.select import MEASURED, best_columns, checked_columns, random_columns, shared_name, weight_norms
from paca.shared_input import share_inputs

logger = logging.getLogger("paca")


class PacaModel(BaseTuner):
    """A model whose targeted linear layers train some of their input columns in place.

    Usually made by `peft.get_peft_model(model, PacaConfig(...))`. Layers use the backend that is current when they are
    made.

    Raises:
        ValueError, TypeError: before any layer is replaced, if the config does not fit the model.
    """

    prefix = "paca_"
    _permutation: Any = None  # a Permutation, while heads and channels are reordered
    tuner_layer_cls = PacaLayer
    target_module_mapping = {**TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING}  # type: ignore[dict-item]  # noqa: RUF012

    # ------------------------------------------------------------------ making layers

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.random_seed is None:  # as upstream: any columns; noted, so that they can be drawn again
            peft_config.random_seed = int(torch.randint(2**31, (), device="cpu"))
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model, after checking that all of it can be added."""
        known_tensors = kwargs.get("state_dict")
        refuse_held(model)
        config = settings(self.peft_config[adapter_name])
        given: Any = self.peft_config[adapter_name]
        given.target_modules = config.target_modules = _targets_asked(config, model)
        reorders = config.copermute and config.columns is None
        config = self.with_columns(model, config)
        if config.columns is not None:
            self.peft_config[adapter_name] = config
        self._refuse_moved_rows(model, config)
        self._tied = Counter(_memory(p) for _, p in model.named_parameters(remove_duplicate=False))
        if known_tensors is None and config.target_modules != DUMMY_TARGET_MODULES:
            self.check_fits(model, config)
        if config.groups and not config.inference_mode:
            self._refuse_unheld(model, config)
        if reorders:
            self._reorder(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.start_from == "checkpoint" and known_tensors is None and not config.inference_mode:
            source = config.base_model_name_or_path or getattr(getattr(model, "config", None), "name_or_path", "")
            start_from_checkpoint(self._adapted_layers(), adapter_name, str(source))
        self._schedule(config, adapter_name)
        share_inputs((name, layer) for name, layer in model.named_modules() if isinstance(layer, PacaLayer))
        self._report_residency(config, adapter_name)

    def _refuse_unheld(self, model: nn.Module, config: PacaConfig) -> None:
        """Keep groups off weights that cannot hold all columns while one group trains."""
        for name in self.targets(model, config):
            layer = model.get_submodule(name)
            residency = layer.residency if isinstance(layer, PacaLayer) else self._residency(config, layer, name)
            if residency != "resident":
                raise ValueError(
                    f"{name}: groups need weights that hold their columns, this is {residency}; leave the layer out, "
                    "or `groups`"
                )

    def _refuse_moved_rows(self, model: nn.Module, config: PacaConfig) -> None:
        """Keep adapters off layers whose rows were reordered: their files would have the rows in that order."""
        if self._permutation is None:
            return
        moved = self._permutation.makers | (self._permutation.orders.keys() if config.masked else set())
        if found := [name for name in self.targets(model, config) if name in moved]:
            raise ValueError(
                f"{found[0]} was reordered by an adapter with copermute, which only adapters of the same output and "
                "down projections' columns allow for; unload that one first, or leave the layer out"
            )

    @classmethod
    def _ranks_of_columns(cls, model: nn.Module, config: PacaConfig) -> dict[str, int]:
        """Return the rank that columns chosen by hand mean; of a mask, whose entries are as many as r columns have."""
        chosen = config.columns or {}
        if not config.masked:
            return {key: len(columns) for key, columns in chosen.items()}
        heights = {name: in_out_features(module)[1] for name, module in cls.targets(model, config).items()}
        named = {key: next((out for name, out in heights.items() if _names(key, name)), 1) for key in chosen}
        return {key: len(entries) // named[key] for key, entries in chosen.items()}

    def _schedule(self, config: PacaConfig, adapter_name: str) -> None:
        """Give the adapter's layers what changes from step to step, if the config asks for it."""
        made = schedules_of(config, adapter_name)
        for layer in self._adapted_layers():
            layer.schedules = [schedule for schedule in layer.schedules if schedule.adapter != adapter_name]
            if adapter_name in layer.paca_delta:
                layer.schedules += made

    @classmethod
    def with_columns(cls, model: nn.Module, config: PacaConfig) -> PacaConfig:
        """Return a config with the columns that depend on all layers or on another adapter, and the ranks they mean.

        Raises:
            ValueError, FileNotFoundError: if they cannot be chosen; see `paca.s2ft` and `paca.largest_change`.
        """
        if config.columns is None and config.selection == "s2ft":
            config = s2ft.chosen(model, config, cls.targets(model, config))
        elif config.columns is None and config.selection == "largest_change":
            config = largest_changes(config, cls.targets(model, config))
        ranks = cls._ranks_of_columns(model, config)
        ranks = {name: r for name, r in ranks.items() if r != rank_of(config, name)}
        if ranks:  # columns are not saved with the config; how many there are must be
            config.rank_pattern = {**ranks, **{k: r for k, r in config.rank_pattern.items() if k not in ranks}}
        return config

    def _reorder(self, model: nn.Module, config: PacaConfig) -> None:
        """Put the heads and channels that a config trains side by side in the base model."""
        if adapted := [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
            raise ValueError(f"copermute reorders the base model, and {adapted[0]} has an adapter; make this one first")
        chosen = config.columns or {}
        names = {key: next(n for n, _ in model.named_modules() if _names(key, n)) for key in chosen}
        known = s2ft.blocks(model)
        self._refuse_trained_rows(
            model, config, {maker for name in names.values() for maker in known[name].maker_paths}
        )
        self._permutation = copermute(model, {names[key]: columns for key, columns in chosen.items()})
        config.columns = {key: list(range(len(columns))) for key, columns in chosen.items()}

    @staticmethod
    def _refuse_trained_rows(model: nn.Module, config: PacaConfig, makers: Iterable[str]) -> None:
        """Keep what else trains off linears whose rows were reordered: it would be saved in that order."""
        for name in sorted(makers):
            if config.bias == "all" and model.get_submodule(name).bias is not None:
                raise ValueError(
                    f"copermute reorders the rows of {name}, whose bias would be saved in that order; use "
                    "bias='paca_only', or leave copermute out"
                )
            inside = list(accumulate(name.split("."), "{}.{}".format))  # the module, and those around it
            if saved := [module for module in config.modules_to_save or () if any(n.endswith(module) for n in inside)]:
                raise ValueError(
                    f"copermute reorders the rows of {name}, which modules_to_save={saved[0]!r} would save in that "
                    "order; leave one of the two out"
                )

    @classmethod
    def targets(cls, model: nn.Module, config: Any) -> dict[str, nn.Module]:
        """Return the base layers that a config would adapt, by module name.

        Raises:
            TypeError: if one of them cannot be adapted.
            ValueError: if no targets are given and the architecture has no usual ones.
        """
        probe: Any = copy.copy(settings(config))
        if probe.target_modules is None:
            usual = cls.target_module_mapping.get(cls.get_model_config(model).get("model_type", ""))
            if usual is None:
                raise ValueError("Please specify `target_modules` in `peft_config`")
            probe.target_modules = usual
        probe.target_modules = _targets_asked(probe, model)
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        found = {}
        for name, module in model.named_modules():
            if not name or name.startswith(inside) or not _matches(probe, name):
                continue
            found[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            try:
                in_out_features(found[name])
            except TypeError as error:
                raise TypeError(f"{name}: {error} Name other target_modules or exclude it.") from None
        return found

    @classmethod
    def check_fits(cls, model: nn.Module, config: PacaConfig, calibrates: bool = False) -> None:
        """Find what would fail half-way through the injection.

        Args:
            model: the base model, with or without values.
            config: the adapter's.
            calibrates: whether a calibration pass will choose the columns that the config leaves open.

        Raises:
            ValueError, TypeError: naming the layer, what was found and what is possible.
        """
        targets = cls.targets(model, config)
        widths = {name: in_out_features(module)[0] for name, module in targets.items()}
        if config.masked:
            cls._check_masks_fit(targets)
        for name in targets:
            layer = model.get_submodule(name)
            if isinstance(layer, PacaLayer) and isinstance(layer, MaskedLinear) != config.masked:
                has, gets = ("columns", "a mask") if config.masked else ("a mask", "columns")
                raise ValueError(
                    f"{name} has an adapter that trains {has}, and the new one trains {gets}; the adapters of a weight "
                    "are all of one kind: delete or unload the other one first"
                )
        if too_wide := {name: width for name, width in widths.items() if rank_of(config, name) > width}:
            name, width = min(too_wide.items(), key=lambda item: item[1])
            raise ValueError(
                f"r = {rank_of(config, name)} is more than the {width} input columns of {name} ({len(too_wide)} of "
                f"{len(widths)} targeted layers have fewer than r); choose r ≤ {width}, set rank_pattern for these "
                "layers, or exclude them"
            )
        if few := [name for name in widths if rank_of(config, name) < (config.groups or 0)]:
            raise ValueError(
                f"groups = {config.groups} is more than the {rank_of(config, few[0])} columns that {few[0]} trains "
                f"({len(few)} of {len(widths)} targeted layers have fewer); choose fewer groups, or a larger r"
            )
        if config.selection in MEASURED and widths and config.columns is None and not calibrates:
            raise ValueError(
                f"selection={config.selection!r} needs a calibration pass: config = paca.calibrate(model, config, "
                "batches), then get_peft_model"
            )
        for key, columns in (config.columns or {}).items():
            named = [name for name in widths if _names(key, name)]
            if not named:
                raise ValueError(f"columns[{key!r}] matches no targeted layer")
            for name in named:
                height = in_out_features(targets[name])[1] if config.masked else 1
                checked_columns(columns, widths[name] * height, name)
                if len(columns) % height:
                    raise ValueError(
                        f"columns[{key!r}] has {len(columns)} entries; a mask of {name} trains as many as some columns "
                        f"of {height} have, a multiple of {height}"
                    )

    @classmethod
    def _check_masks_fit(cls, targets: dict[str, nn.Module]) -> None:
        if quantised := [name for name, module in targets.items() if library_of(module) is not None]:
            raise ValueError(
                f"{quantised[0]} is quantised, and the entries of a mask live in the weight; choose columns "
                "(selection='random') for a quantised model"
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = settings(peft_config)
        layer = target if isinstance(target, PacaLayer) else None
        if layer is None:
            residency = self._residency(config, target, current_key)
            kind = MaskedLinear if config.masked else AdaptedLinear
            layer = kind(target, current_key, get_backend(), residency, model_dtype(self.model))
        elif config.residency not in ("auto", layer.residency):
            raise ValueError(
                f"{current_key}: residency={config.residency!r}, but the weight's other adapters are "
                f"{layer.residency}; all adapters of a weight live in the same way: use 'auto'"
            )
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), current_key), config.paca_alpha)
        layer.update_layer(
            adapter_name,
            self._select(config, layer, parent, current_key),
            alpha,
            init_weights=config.init_weights,
            inference_mode=config.inference_mode,
            fingerprint=(config.base_fingerprint or {}).get(current_key, "") if config.check_base else "",
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _residency(self, config: PacaConfig, target: nn.Module, name: str) -> str:
        """Decide where the columns of a layer live between steps."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if library_of(base) is not None:
            if config.residency != "auto":
                raise ValueError(
                    f"{name}: residency={config.residency!r}, but its weight is quantised, so no columns can be "
                    "written to it; use 'auto'"
                )
            return "quantised"
        weight = base.weight
        assert isinstance(weight, Tensor)
        why = "the weight is tied to another module's" if self._tied[_memory(weight)] > 1 else why_not_resident(weight)
        if config.residency == "resident" and why:
            raise ValueError(
                f"{name}: residency='resident' is impossible because {why}; use 'auto' or 'swap', or exclude the module"
            )
        if config.residency != "auto":
            return config.residency
        if why:
            self._swapped = {**getattr(self, "_swapped", {}), name: why}
        return "swap" if why else "resident"

    def _select(self, config: PacaConfig, layer: PacaLayer, parent: nn.Module, name: str) -> Tensor:
        """Choose the columns of one layer, (r,) int64 on the CPU."""
        chosen = next((columns for key, columns in (config.columns or {}).items() if _names(key, name)), None)
        if chosen is not None:
            return checked_columns(chosen, layer.grid[1], name)
        r = rank_of(config, name)
        if isinstance(layer, MaskedLinear):
            return layer.choose(config.selection, r, config.random_seed or 0)
        if config.selection == "weight_norm":
            return best_columns(weight_norms(list(self._weights_with_same_input(config, layer, parent, name))), r)
        drawn_as = shared_name(name) if config.share_columns else name
        with torch.device("cpu"):  # low_cpu_mem_usage makes everything else on the meta device
            return random_columns(layer.in_features, r, config.random_seed or 0, drawn_as)

    def _weights_with_same_input(
        self, config: PacaConfig, layer: PacaLayer, parent: nn.Module, name: str
    ) -> Iterator[Tensor]:
        """Give the pretrained weights (out, in) that are ranked together with a layer's own."""
        yield layer.pretrained_weight()
        prefix = name.rpartition(".")[0]
        for leaf, sibling in parent.named_children() if config.share_columns else ():
            other = f"{prefix}.{leaf}" if prefix else leaf
            if other == name or shared_name(other) != shared_name(name) or not _matches(config, other):
                continue
            if isinstance(sibling, PacaLayer) and sibling.in_features == layer.in_features:
                yield sibling.pretrained_weight()
            elif isinstance(sibling, nn.Linear) and sibling.in_features == layer.in_features:
                library = library_of(sibling)
                yield sibling.weight if library is None else base_weight(sibling, library)

    def _report_residency(self, config: PacaConfig, adapter_name: str) -> None:
        """Print where the columns live; one line, louder if something cannot be resident."""
        layers = [layer for layer in self._adapted_layers() if adapter_name in layer.paca_delta]
        swapped = {
            layer.name: getattr(self, "_swapped", {}).get(layer.name, "")
            for layer in layers
            if layer.residency == "swap"
        }
        quantised = sum(layer.residency == "quantised" for layer in layers)
        logger.info(
            "paca: %d layers adapted, %d resident, %d swapped, %d quantised",
            len(layers),
            len(layers) - len(swapped) - quantised,
            len(swapped),
            quantised,
        )
        if reasons := {name: why for name, why in swapped.items() if why}:
            name, why = next(iter(reasons.items()))
            more = f" (and {len(reasons) - 1} more layers)" if len(reasons) > 1 else ""
            logger.warning(
                "paca: %s%s: %s, so its columns are swapped in around each GEMM; that is slower and as exact",
                name,
                more,
                why,
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas are made in float32; `autocast_adapter_dtype=False` asks for the weight's dtype instead."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for layer in self._adapted_layers():
            if adapter_name in layer.paca_delta:
                delta = layer.paca_delta[adapter_name]
                layer.paca_delta[adapter_name] = nn.Parameter(delta.to(layer.adapted.dtype), delta.requires_grad)
                layer.sync()

    def _adapted_layers(self) -> list[PacaLayer]:
        return [module for module in self.model.modules() if isinstance(module, PacaLayer)]

    # ------------------------------------------------------------------ adapters together

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active; of each weight only the columns that the old and the new ones train are written.

        Args:
            adapter_name: one name or several, whose updates add up.
            inference_mode: do not train them.
        """
        with torch.no_grad(), freshness.one_write():
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give each row of a batch its own adapter, if `adapter_names` says so; see `paca.mixing`."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        beams = kwargs.get("num_beams")
        with mixed_batch(self, names, beams if isinstance(beams, int) else 1):
            yield

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Make an adapter whose update is the weighted sum of others', exactly: it trains the union of their columns.

        Args:
            adapters: names of existing adapters.
            weights: a factor for each; negative ones subtract.
            adapter_name: the new one; nothing happens if it exists, as with LoRA.
            combination_type: "linear" or "cat"; both mean the same sum here, because columns are disjoint or added.

        Raises:
            ValueError: for an unknown adapter or type, a name no module can have, or weights that are not as many
                finite numbers.
        """
        if adapter_name in self.peft_config:
            return
        if not adapter_name or "." in adapter_name:
            raise ValueError(f"the new adapter needs a name without dots, found {adapter_name!r}")
        if not adapters:
            raise ValueError("a weighted sum needs at least one adapter, found none")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"Adapter {unknown[0]} does not exist; there are {', '.join(self.peft_config)}")
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters need as many weights, found {len(weights)}")
        if not all(isinstance(weight, Real | Tensor) and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite numbers, found {weights}")
        if combination_type not in ("linear", "cat"):
            raise ValueError(f"combination_type must be 'linear' or 'cat', found {combination_type!r}")
        if saved := [name for name in adapters if settings(self.peft_config[name]).modules_to_save]:
            raise ValueError(f"adapter {saved[0]!r} has modules_to_save, which cannot be summed")
        if len({settings(self.peft_config[name]).masked for name in adapters}) > 1:
            raise ValueError("columns and masks cannot be summed: what a mask trains is no column")

        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, PacaLayer)}
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in layers.items():
            used = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.paca_delta]
            if not used:
                continue
            index = torch.cat([layer.paca_indices[a] for a, _ in used]).unique()
            if isinstance(layer, MaskedLinear):  # as many entries as some columns have
                index = padded(index, layer.out_features)
            dtype = reduce(torch.promote_types, (layer.paca_delta[a].dtype for a, _ in used))
            delta = torch.zeros(layer.grid[0], len(index), dtype=dtype, device=index.device)
            for adapter, weight in used:
                position = torch.searchsorted(index, layer.paca_indices[adapter])
                delta.index_add_(
                    1,
                    position,
                    layer.paca_delta[adapter].detach().to(delta.dtype),
                    alpha=weight * layer.scaling[adapter],
                )
            sums[name] = index, delta

        config: Any = copy.deepcopy(settings(self.peft_config[adapters[0]]))
        config.columns = {f"^{re.escape(name)}": index.tolist() for name, (index, _) in sums.items()}
        ranks = {name: delta.numel() // layers[name].out_features for name, (_, delta) in sums.items()}
        config.r = max(ranks.values())
        config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
        config.paca_alpha, config.exclude_modules, config.base_fingerprint = config.r, None, None
        config.target_modules = "|".join(re.escape(name) for name in sums)  # these, and no others that end alike
        config.layers_to_transform = config.layers_pattern = None
        # How the parts were trained says nothing about the sum.
        config.prefix_training = config.groups = config.reselect = None
        config.group_lasso = 0.0
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for name, (_, delta) in sums.items():
                layers[name].paca_delta[adapter_name].copy_(delta)
                layers[name].sync()

    # ------------------------------------------------------------------ leaving and saving

    def _check_merge_allowed(self) -> None:
        """Refuse before any layer is merged what the last of them could not do."""
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        for layer in self._adapted_layers():
            if isinstance(layer.adapted, QuantisedWeight):
                layer.adapted.check_can_merge()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Take the adapters off.

        Heads and channels go back to their places; merged into a quantised base, the layers are ordinary ones
        afterwards.
        """
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if self._permutation is not None:
            self._permutation.undo(self.model)
            self._permutation = None
        if merge and is_noted_quantised(self.model) and not has_quantised_layers(self.model):
            forget_quantisation(self.model)
        return self.model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select the adapter's tensors, and note in its config which base columns they belong to."""
        if isinstance(config, PacaConfig):
            config.base_fingerprint = {
                layer.name: layer.fingerprint(adapter_name)
                for layer in model.modules()
                if isinstance(layer, PacaLayer) and adapter_name in layer.paca_delta and layer.has_values(adapter_name)
            } or None
        state: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for layer in model.modules():
            if isinstance(layer, PacaLayer) and adapter_name in layer.paca_delta and layer.order is not None:
                key = next(k for k in state if k.endswith(f"{layer.name}.paca_indices.{adapter_name}"))
                state[key] = layer.order.to(state[key].device)[state[key]]
        return to_file(state, adapter_name) if settings(config).masked else state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Expand compressed columns, and lay masks out as rows, on their way into the model."""
        expand = from_file(expanded(state_dict))
        for layer in model.modules():
            if isinstance(layer, PacaLayer) and adapter_name in layer.paca_delta and layer.order is not None:
                for key in [k for k in expand if k.endswith(f"{layer.name}.paca_indices")]:
                    expand[key] = layer.order.argsort()[expand[key].cpu()]
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, expand)
        return remapped


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the parameters that are not quantised, torch's default if there are none."""
    plain = (p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point())
    return next(plain, torch.get_default_dtype())


def _memory(weight: Tensor) -> int:
    """Identify the memory that a weight is in, which tied weights share; a weight without values by itself."""
    return id(weight) if weight.is_meta else weight.data_ptr() or id(weight)


def _targets_asked(config: PacaConfig, model: nn.Module) -> Any:
    """Return `target_modules`, with names for "all-linear".

    PEFT's own reading of it knows torch's and transformers' classes, and leaves out those of HQQ and gptqmodel.
    """
    asked = config.target_modules
    if not isinstance(asked, str) or asked.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return asked
    torchs_own: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return torchs_own.target_modules | {
        name
        for name, module in model.named_modules()
        if is_of_own_class(module) and module is not output and not name.startswith(inside)
    }


def _matches(config: Any, name: str) -> bool:
    """Whether a config targets the module of this name."""
    found = check_target_module_exists(config, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


def rank_of(config: PacaConfig, name: str) -> int:
    """The rank of one module, by `rank_pattern` if it matches."""
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)


def _names(key: str, name: str) -> bool:
    """Whether a key of `columns` means this module, as the keys of `rank_pattern` do."""
    return get_pattern_key([key], name) == key
