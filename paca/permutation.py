"""Reorders heads and channels of a model so that chosen ones come first, without changing what it computes.

Co-permutation (S²FT, arXiv 2412.06289): the rows of the maps that make a hidden dimension and the columns of the map
that reads it are reordered alike, so that only the order of a sum changes. Trained columns then are one slice of the
weight: gathered and written without an index. Keys and values of grouped-query attention move with all the query heads
that they serve. `undo` puts every weight back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paca.s2ft import Block, blocks

ORDER = "_paca_order"  # on a reader: the original column at each position, (in,) int64


@dataclass(frozen=True)
class Permutation:
    """What was reordered: by reader, the original column at each position; and the layers whose rows moved with it."""

    orders: Mapping[str, Tensor]
    makers: frozenset[str]

    @torch.no_grad()
    def undo(self, model: nn.Module) -> None:
        """Put heads and channels of a base model back, bit for bit; its adapters must be gone or restored."""
        known = blocks(model)
        for name, order in self.orders.items():
            _apply(model, known[name], order.argsort())
            delattr(model.get_submodule(name), ORDER)


@torch.no_grad()
def copermute(model: nn.Module, columns: Mapping[str, list[int]]) -> Permutation:
    """Reorder a base model in place so that these columns of its readers come first.

    Args:
        model: without adapters.
        columns: reader's name → column numbers, whole heads (or groups of heads) where it reads an attention.

    Returns:
        What `undo` needs.

    Raises:
        ValueError: if a module is no reader that can be reordered, is reordered already, or a head would be torn apart.
    """
    known = blocks(model)
    orders, makers = {}, set()
    for name, chosen in columns.items():
        block = known.get(name)
        if block is None:
            raise ValueError(f"{name} cannot be reordered: the linears that make its input are not known")
        if hasattr(model.get_submodule(name), ORDER):
            raise ValueError(f"{name} is reordered already, for another adapter; unload that one first")
        parts = [model.get_submodule(part) for part in (*block.maker_paths, name)]
        if any(type(part).forward is not nn.Linear.forward for part in parts):
            raise ValueError(f"{name} cannot be reordered: its weights are not plain ones, but quantised or wrapped")
        if why := _why_not(model, block):
            raise ValueError(f"{name} cannot be reordered: {why}")
        first = torch.tensor(sorted(chosen))
        unit = block.unit(whole_groups=True)
        if len(first) % unit or not torch.equal(first, (first[::unit, None] + torch.arange(unit)).flatten()):
            raise ValueError(f"{name}: columns must be whole groups of {unit}, which share a key head")
        rest = torch.ones(block.width, dtype=torch.bool)
        rest[first] = False
        makers.update(block.maker_paths)
        orders[name] = torch.cat([first, rest.nonzero().flatten()])
    for name, order in orders.items():
        _apply(model, known[name], order)
        setattr(model.get_submodule(name), ORDER, order)
    return Permutation(orders, frozenset(makers))


def _why_not(model: nn.Module, block: Block) -> str:
    """Say what else of the model depends on the order of a block's heads or channels, or nothing."""
    memory = [parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False)]
    parts = (*block.maker_paths, block.reader_path)
    if any(memory.count(model.get_parameter(f"{part}.weight").data_ptr()) > 1 for part in parts):
        return "one of its weights is tied to another module's"
    if block.heads and getattr(getattr(model, "config", None), "num_kv_shared_layers", 0):
        return "layers of this model share keys and values"
    own = (*block.makers, block.reader)
    for name, parameter in model.get_submodule(block.path).named_parameters():
        if name.split(".")[0] in own:
            continue
        head = (block.width // block.heads,) if block.heads else ()
        alike = name.count(".") == 1 and parameter.shape == head  # a norm that all heads have in common
        if (block.heads and not alike) or (not block.heads and parameter.shape == (block.width,)):
            return f"{name} {tuple(parameter.shape)} may belong to its heads or channels one by one"
    return ""


def _apply(model: nn.Module, block: Block, order: Tensor) -> None:
    """Give position i of the hidden dimension what position order[i] had."""
    parent = model.get_submodule(block.path)
    reader = getattr(parent, block.reader)
    _reorder(reader.weight, order, dim=1)
    for number, name in enumerate(block.makers):
        maker = getattr(parent, name)
        rows = order if number == 0 or not block.heads else _key_rows(order, block)
        _reorder(maker.weight, rows, dim=0)
        if maker.bias is not None:
            _reorder(maker.bias, rows, dim=0)


def _key_rows(order: Tensor, block: Block) -> Tensor:
    """Turn an order of query columns, which moves whole groups, into that of the rows of keys or values."""
    group, size = block.width // block.key_heads, block.width // block.heads
    heads = order[::group] // group
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _reorder(tensor: Tensor, order: Tensor, dim: int) -> None:
    tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
