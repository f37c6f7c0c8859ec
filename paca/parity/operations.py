"""Runs each tensor operation of a backend by itself on the numbers of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from paca.backend import Backend, Ops
from paca.parity.cases import Case
from paca.parity.layouts import Bias, Storage
from paca.parity.truth import readers
from paca.strategies import ColumnSwitch, ColumnWrite

# Results with an axis for each leading size of x.
_OF_TOKENS = {"gathered", "y", "grad_input", "grad_input_sum", "y_after"}


def run_gather(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`x[..., index]`."""
    return {"gathered": ops.gather(x_of(case, device), case.inputs["index"].to(device))}


def run_forward(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`x Wᵀ + b`."""
    weight = matrix_of(case, case.expected["adapted"], device)
    bias = None if case.bias is Bias.NONE else case.inputs["bias"].to(device)
    return {"y": ops.forward(x_of(case, device), weight, bias)}


def run_grad_input(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`gy W`."""
    return {"grad_input": ops.grad_input(gy_of(case, device), matrix_of(case, case.expected["adapted"], device))}


def run_grad_input_sum(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """The sum of the products of `readers`."""
    assert ops.grad_input_sum is not None
    gys, weights = zip(*readers(case.inputs["gy"], case.expected["adapted"]), strict=True)
    total = ops.grad_input_sum(
        [shaped(case, gy, device) for gy in gys], [matrix_of(case, weight, device) for weight in weights]
    )
    return {"grad_input_sum": total}


def run_grad_columns(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`s·gyᵀ xs`."""
    gathered = shaped(case, case.inputs["x"].index_select(1, case.inputs["index"]), device)
    return {"grad_delta": ops.grad_columns(gy_of(case, device), gathered, case.scale)}


def run_write(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`W[:, index] = base + s·Δ`: two weights of unequal sizes in one call, as a step of a model does.

    The second has its columns in reverse, and a row more.
    """
    weight, index, delta_after = (case.inputs[key] for key in ("weight", "index", "delta_after"))
    one = _column_write(case, weight, index, case.inputs["delta"], device)
    mirrored = weight.shape[1] - 1 - index.flip(0)
    weight, delta_after = (
        torch.cat([rows.flip(1), rows.new_zeros(1, rows.shape[1])]) for rows in (weight, delta_after)
    )
    other = _column_write(case, weight, mirrored, delta_after, device)
    ops.write_columns([one, other])
    return {"adapted": one.weight, "adapted_after": other.weight[:-1].flip(1)}


def run_switch(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """Put pretrained columns back and write others: one weight turns to other columns, one keeps all but one."""
    weight, index = case.inputs["weight"], case.inputs["index"]
    others = torch.ones(weight.shape[1], dtype=torch.bool).index_fill(0, index, False).nonzero()[:, 0]
    turned, kept = (_column_write(case, weight, index, case.inputs[key], device) for key in ("delta", "delta_after"))
    one_more = torch.cat([index, others[:1]]).sort().values
    ops.switch_columns(
        [
            ColumnSwitch(_left(case, others, turned, device) if len(others) else None, turned, apart=True),
            ColumnSwitch(_left(case, one_more, kept, device), kept, apart=False),
        ]
    )
    return {"adapted": turned.weight, "adapted_after": kept.weight}


def _left(case: Case, index: Tensor, new: ColumnWrite, device: torch.device) -> ColumnWrite:
    """Return the columns of an adapter that is left for `new`, and let their weight hold some of its values."""
    weight = case.inputs["weight"]
    left = _column_write(case, weight, index, case.inputs["delta"].new_zeros(len(weight), len(index)), device)
    new.weight.index_fill_(1, left.index, 7.0)
    return replace(left, weight=new.weight)


class Operation(NamedTuple):
    """One of the functions of `Ops`, and what it gives."""

    run: Callable[[Case, Ops, torch.device], dict[str, Tensor]]
    results: tuple[str, ...]


# By the fields of `Ops`.
OPERATIONS = {
    "gather": Operation(run_gather, ("gathered",)),
    "forward": Operation(run_forward, ("y",)),
    "grad_input": Operation(run_grad_input, ("grad_input",)),
    "grad_input_sum": Operation(run_grad_input_sum, ("grad_input_sum",)),
    "grad_columns": Operation(run_grad_columns, ("grad_delta",)),
    "write_columns": Operation(run_write, ("adapted", "adapted_after")),
    "switch_columns": Operation(run_switch, ("adapted", "adapted_after")),
}


def run_operation(case: Case, field: str, backend: Backend) -> dict[str, Tensor]:
    """Run one of `OPERATIONS`; its results come by their names, on the CPU, tokens flattened."""
    with torch.no_grad():
        return collected(case, OPERATIONS[field].run(case, backend.ops, backend.device()), backend)


def _column_write(case: Case, weight: Tensor, index: Tensor, delta: Tensor, device: torch.device) -> ColumnWrite:
    matrix = matrix_of(case, weight, device)
    index = index.to(device)
    neighbours = int(index[-1]) - int(index[0]) == len(index) - 1
    base = matrix.index_select(1, index)
    return ColumnWrite(matrix, index, base, delta.to(device), case.scale, int(index[0]) if neighbours else None)


def matrix_of(case: Case, weight: Tensor, device: torch.device) -> Tensor:
    """Return a weight as a layer of this case gives it to the backend: (out, in), a transposed view for Conv1D."""
    if case.storage is Storage.CONV1D:
        return weight.t().contiguous().to(device, copy=True).t()
    return weight.to(device, copy=True)


def x_of(case: Case, device: torch.device) -> Tensor:
    """Return the input as the layer gets it, (…, in)."""
    return shaped(case, case.inputs["x"], device)


def gy_of(case: Case, device: torch.device) -> Tensor:
    """Return the upstream gradient, (…, out)."""
    return shaped(case, case.inputs["gy"], device)


def shaped(case: Case, values: Tensor, device: torch.device) -> Tensor:
    """Give the tokens of a recorded tensor (tokens, n) their leading sizes."""
    return values.to(device, copy=True).reshape(*case.lead, values.shape[-1])


def collected(case: Case, found: Mapping[str, Tensor], backend: Backend) -> dict[str, Tensor]:
    """Wait for the device and fetch what it computed; what has the leading sizes that it should have loses them."""
    backend.synchronize()
    collected = {}
    for name, value in found.items():
        of_tokens = name in _OF_TOKENS and value.shape[:-1] == case.lead
        flat = value.reshape(len(case.inputs["x"]), value.shape[-1]) if of_tokens else value
        collected[name] = flat.detach().cpu()
    return collected
