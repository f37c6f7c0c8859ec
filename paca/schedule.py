"""What changes from one optimizer step to the next: which columns train, and which are given up for others.

Each option of the family that works over time is one schedule, shared by the layers of an adapter. An optimizer that
owns their deltas tells it before and after each of its steps, before the columns are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paca.config import PacaConfig
from paca.errors import OptimizerError
from paca.select import generator_for, shared_name

if TYPE_CHECKING:
    from paca.layer import PacaLayer


class Schedule:
    """Does nothing; the base of the others.

    Args:
        adapter: whose deltas it is about.
        seed: of all its choices; with the number of the step they depend on nothing else.
    """

    def __init__(self, adapter: str, seed: int) -> None:
        self.adapter = adapter
        self.seed = seed
        self.step = 0  # optimizer steps taken

    def before_step(self, optimizer: Optimizer, layers: Sequence[PacaLayer]) -> None:
        """Look at what the optimizer is about to do."""

    def after_step(self, optimizer: Optimizer, layers: Sequence[PacaLayer]) -> None:
        """Change what it did, and what trains next."""
        self.step += 1


class _Parts(Schedule):
    """Trains some neighbouring columns in each step; the others keep their values and their optimizer state."""

    def __init__(self, adapter: str, seed: int) -> None:
        super().__init__(adapter, seed)
        # A delta, its columns that rest, and what these hold in it and in each tensor of its optimizer state.
        self._kept: list[tuple[Tensor, Tensor, list[Tensor]]] = []

    def part(self, columns: int) -> tuple[int, int]:
        """Return the first and last + 1 of the columns that train in this step, of so many."""
        raise NotImplementedError

    def before_step(self, optimizer: Optimizer, layers: Sequence[PacaLayer]) -> None:
        """Note the columns that rest: an optimizer with momentum would move them although their gradient is zero."""
        self._kept = []
        for layer in layers:
            delta = layer.paca_delta[self.adapter]
            first, end = self.part(delta.shape[1])
            rest = torch.cat([torch.arange(first), torch.arange(end, delta.shape[1])]).to(delta.device)
            tensors = (delta, *state_of(optimizer, delta))
            self._kept.append((delta, rest, [tensor.detach().index_select(1, rest) for tensor in tensors]))

    def after_step(self, optimizer: Optimizer, layers: Sequence[PacaLayer]) -> None:
        """Put them back, and turn to the next part."""
        for delta, rest, values in self._kept:
            for number, tensor in enumerate((delta, *state_of(optimizer, delta))):
                if number < len(values):
                    tensor.data.index_copy_(1, rest, values[number])
                else:  # made in this step, maybe of the values: SGD's momentum has the weight decay in it
                    tensor.data.index_fill_(1, rest, 0)
        self._kept = []
        super().after_step(optimizer, layers)


class Prefixes(_Parts):
    """DyLoRA (arXiv 2210.07558): each step trains and runs with the first b columns only, b drawn anew.

    The adapter then serves every rank from `least` to `most`: its first b columns are an adapter.
    """

    def __init__(self, adapter: str, seed: int, least: int, most: int) -> None:
        super().__init__(adapter, seed)
        self.least, self.most = least, most

    def part(self, columns: int) -> tuple[int, int]:
        """Return 0 and b, the same b in all layers."""
        generator = generator_for(self.seed, f"prefix of step {self.step}")
        return 0, min(columns, int(torch.randint(self.least, self.most + 1, (), generator=generator)))


class Groups(_Parts):
    """MoSA (arXiv 2312.02923): disjoint groups of columns, one of which trains in each step.

    All groups stay in the weight, so that merging them is nothing to be done, and only the group's channels are kept.
    """

    def __init__(self, adapter: str, seed: int, groups: int) -> None:
        super().__init__(adapter, seed)
        self.groups = groups

    def part(self, columns: int) -> tuple[int, int]:
        """Return the bounds of the step's group; each group has its turn once in `groups` steps, in random order."""
        turn, place = divmod(self.step, self.groups)
        group = int(torch.randperm(self.groups, generator=generator_for(self.seed, f"groups of turn {turn}"))[place])
        return group * columns // self.groups, (group + 1) * columns // self.groups


class Reselect(Schedule):
    """Gives up the columns that moved least for others, drawn at random, every so many steps or at the end of an epoch.

    A quarter of the columns at a time. A new column starts clean: its delta and its optimizer state are zero; the one
    given up goes back to its pretrained value. Layers that share their columns go on sharing them.

    Args:
        adapter, seed: as for all.
        every: so many steps, or None for an epoch's, which `steps_an_epoch` tells.
    """

    def __init__(self, adapter: str, seed: int, every: int | None) -> None:
        super().__init__(adapter, seed)
        self.every = every
        self.by_epoch = every is None

    def before_step(self, optimizer: Optimizer, layers: Sequence[PacaLayer]) -> None:
        """See that it is known when to choose anew.

        Raises:
            RuntimeError: if nobody told how many steps an epoch has.
        """
        if self.every is None:
            raise RuntimeError(
                "reselect='epoch' needs to know how many optimizer steps an epoch has: `paca train` tells it, a "
                "training loop of your own calls paca.schedule.steps_an_epoch(model, steps) before its first step"
            )

    def after_step(self, optimizer: Optimizer, layers: Sequence[PacaLayer]) -> None:
        """Count, and choose anew when it is time."""
        super().after_step(optimizer, layers)
        assert self.every is not None
        for layer in layers:  # an optimizer whose state has no columns is refused now, not when it is time
            state_of(optimizer, layer.paca_delta[self.adapter])
        if self.step % self.every:
            return
        rows: dict[tuple[str, bytes], list[PacaLayer]] = {}
        for layer in layers:
            numbers = layer.paca_indices[self.adapter].cpu().numpy().tobytes()
            rows.setdefault((shared_name(layer.name), numbers), []).append(layer)
        for (name, _), row in rows.items():
            self._renew(optimizer, name, row)

    def _renew(self, optimizer: Optimizer, name: str, row: Sequence[PacaLayer]) -> None:
        index, width = row[0].paca_indices[self.adapter].cpu(), row[0].in_features
        count = min(max(1, len(index) // 4), width - len(index))
        if not count:
            return  # all columns train
        moved = torch.stack([layer.paca_delta[self.adapter].detach().double().square().sum(0).cpu() for layer in row])
        given_up = moved.sum(0).argsort(stable=True)[:count]
        free = torch.ones(width, dtype=torch.bool)
        free[index] = False
        others = free.nonzero().flatten()
        draw = torch.randperm(len(others), generator=generator_for(self.seed, f"{name} after step {self.step}"))
        renewed = index.clone()
        renewed[given_up] = others[draw[:count]]
        renewed, order = renewed.sort()
        fresh = torch.isin(order, given_up)
        for layer in row:
            delta = layer.paca_delta[self.adapter]
            for tensor in (delta, *state_of(optimizer, delta)):
                columns = tensor.detach()[:, order.to(tensor.device)]
                columns[:, fresh.to(tensor.device)] = 0
                tensor.data.copy_(columns)
            layer.replace_columns(self.adapter, renewed)


class GroupLasso(Schedule):
    """GS-LoRA++ (arXiv 2501.09705): a penalty λ·Σ‖Δ_l‖_F over layers, under which layers that matter little drop out.

    The penalty is applied after the step in closed form (its proximal map), so that a layer that drops out is exactly
    zero: Δ ← Δ · max(0, 1 − lr·λ / ‖Δ‖_F).
    """

    def __init__(self, adapter: str, seed: int, strength: float) -> None:
        super().__init__(adapter, seed)
        self.strength = strength

    def after_step(self, optimizer: Optimizer, layers: Sequence[PacaLayer]) -> None:
        """Shrink each layer."""
        super().after_step(optimizer, layers)
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for layer in layers:
            delta = layer.paca_delta[self.adapter]
            norm = delta.detach().double().norm()
            shrink = (1 - rates[id(delta)] * self.strength / norm.clamp_min(1e-30)).clamp_min(0)
            delta.data.mul_(shrink.to(delta.dtype))


def dropped_out(model: nn.Module) -> list[str]:
    """Name the layers that a group lasso made zero."""
    from paca.layer import PacaLayer

    layers = {module.name: module for module in model.modules() if isinstance(module, PacaLayer)}
    return [
        name
        for name, layer in layers.items()
        if any(isinstance(s, GroupLasso) and not layer.paca_delta[s.adapter].any() for s in layer.schedules)
    ]


def go_to(model: nn.Module, step: int) -> None:
    """Let all schedules of a model be where an uninterrupted run is after so many optimizer steps.

    `paca train` does it when it resumes; a training loop of your own calls it after loading a checkpoint.
    """
    for schedule in _schedules(model):
        schedule.step = step


def steps_an_epoch(model: nn.Module, steps: int) -> None:
    """Tell a model's schedules that go by epochs how many optimizer steps one has, at least 1.

    Raises:
        ValueError: if it is less.
    """
    if steps < 1:
        raise ValueError(f"an epoch must have at least one optimizer step, found {steps}")
    for schedule in _schedules(model):
        if isinstance(schedule, Reselect) and schedule.by_epoch:
            schedule.every = steps


def _schedules(model: nn.Module) -> Iterator[Schedule]:
    from paca.layer import PacaLayer

    for module in model.modules():
        if isinstance(module, PacaLayer):
            yield from module.schedules


def schedules_of(config: PacaConfig, adapter: str) -> list[Schedule]:
    """Return the schedules that a config asks for, for one adapter."""
    seed = config.random_seed or 0
    made: list[Schedule] = []
    if config.prefix_training:
        made.append(Prefixes(adapter, seed, config.prefix_training["min"], config.prefix_training["max"]))
    if config.groups:
        made.append(Groups(adapter, seed, config.groups))
    if config.reselect:
        made.append(Reselect(adapter, seed, None if config.reselect == "epoch" else config.reselect))
    if config.group_lasso:
        made.append(GroupLasso(adapter, seed, config.group_lasso))
    return made


def state_of(optimizer: Optimizer, delta: Tensor) -> list[Tensor]:
    """Return an optimizer's tensors that hold a number for each entry of a delta, such as Adam's moments.

    Raises:
        OptimizerError: if it keeps them in another form, as 8-bit optimizers do, whose columns cannot be told apart.
    """
    state: dict[str, Any] = optimizer.state.get(delta, {})
    tensors = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    if strange := [t for t in tensors if t.shape != delta.shape or not t.is_floating_point()]:
        raise OptimizerError(
            f"{type(optimizer).__name__} keeps its state as {strange[0].dtype} of shape {tuple(strange[0].shape)}, in "
            "which single columns cannot be held or cleared; use an optimizer with plain moments, such as AdamW"
        )
    return tensors
