"""Says what of a record cannot be compared, before anything is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paca.parity import block, trajectory
from paca.parity.cases import BITWISE, BOUNDED, Case
from paca.parity.formats import name_of

if TYPE_CHECKING:
    from paca.parity.record import Record

# Name to shape and dtype.
_Kinds = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def what_is_wrong(record: Record) -> str:
    """Return the first fault of a record, or nothing."""
    return next(_faults(record), "")


def _faults(record: Record) -> Iterator[str]:
    for name in ("backend", "device", "strategies", "torch", "paca"):
        if not isinstance(record.made_by.get(name), str):
            yield f"it does not say with which {name} it was made"
    if not record.cases:
        yield "it holds no cases"
    names = [case.name for case in record.cases]
    yield from (f"two cases are named {name}" for name in set(names) if names.count(name) > 1)
    for case in record.cases:
        yield from (f"case {case.name}: {fault}" for fault in _case_faults(case))
    if not record.block_dtypes:
        yield "the block was proved exact in no dtype"
    yield from (f"block: {fault}" for fault in _other_tensors(record.block, _kinds(block.draw_block())))
    yield from (f"block: {fault}" for fault in _other_tensors(record.block_expected, _block_results()))
    yield from (f"model: {fault}" for fault in _other_tensors(record.model, _kinds(trajectory.draw_model())))
    for dtype, run in record.trajectories.items():
        tolerance = record.tolerances[dtype]
        listed = [*run.losses, *tolerance.losses, tolerance.deltas]
        if not len(run.losses) == len(tolerance.losses) == trajectory.STEPS:
            yield f"trajectory in {name_of(dtype)}: it is not of {trajectory.STEPS} steps"
        elif not all(isinstance(number, float) and math.isfinite(number) for number in listed):
            yield f"trajectory in {name_of(dtype)}: a loss or tolerance is no finite number"
        elif min(*tolerance.losses, tolerance.deltas) <= 0 or tolerance.deltas >= 1:
            yield f"trajectory in {name_of(dtype)}: a tolerance is not above 0, or that of the deltas not below 1"
        elif not all(bool(delta.isfinite().all()) for delta in run.deltas.values()):
            yield f"trajectory in {name_of(dtype)}: a delta is not finite"


def _case_faults(case: Case) -> Iterator[str]:
    if case.tier not in (BITWISE, BOUNDED):
        yield f"its tier is {case.tier!r}, not {BITWISE!r} or {BOUNDED!r}"
    if not (isinstance(case.alpha, float) and math.isfinite(case.alpha) and case.alpha):
        yield f"its alpha is {case.alpha!r}, no finite number other than 0"
    if not all(type(size) is int and size >= 0 for size in case.lead):
        yield f"its leading sizes are {list(case.lead)}, no counts"
        return
    weight, index = case.inputs.get("weight"), case.inputs.get("index")
    if weight is None or weight.dim() != 2 or index is None or index.dim() != 1:
        yield "its inputs hold no weight (out, in) or no index (r,)"
        return
    (n_out, n_in), r = weight.shape, len(index)
    tokens = math.prod(case.lead)
    wide = torch.float32
    sized: _Kinds = {
        "x": ((tokens, n_in), case.dtype),
        "gy": ((tokens, n_out), case.dtype),
        "weight": ((n_out, n_in), case.dtype),
        "bias": ((n_out,), case.dtype),
        "index": ((r,), torch.int64),
        "delta": ((n_out, r), wide),
        "delta_after": ((n_out, r), wide),
        "gathered": ((tokens, r), case.dtype),
        "y": ((tokens, n_out), case.dtype),
        "grad_input": ((tokens, n_in), case.dtype),
        "grad_input_sum": ((tokens, n_in), case.dtype),
        "adapted": ((n_out, n_in), case.dtype),
        "grad_delta": ((n_out, r), wide),
        "grad_bias": ((n_out,), case.dtype),
        "adapted_after": ((n_out, n_in), case.dtype),
        "y_after": ((tokens, n_out), case.dtype),
    }
    yield from _other_tensors(case.inputs, {name: sized[name] for name in case.input_names})
    yield from _other_tensors(case.expected, {name: sized[name] for name in case.output_names})
    if not r or int(index[0]) < 0 or int(index[-1]) >= n_in or bool((index.diff() <= 0).any()):
        yield f"its index is not of ascending numbers from 0 to {n_in - 1}"
    if not all(bool(value.isfinite().all()) for value in case.inputs.values()):
        yield "an input is not finite"


def _other_tensors(found: Mapping[str, Tensor], wanted: _Kinds) -> Iterator[str]:
    """Say how the names, shapes or dtypes differ from those wanted."""
    for name in wanted.keys() ^ found.keys():
        yield f"{name} is missing" if name in wanted else f"{name} is not known"
    for name in sorted(wanted.keys() & found.keys()):
        kind = tuple(found[name].shape), found[name].dtype
        if kind != wanted[name]:
            yield f"{name} is {kind[0]} {name_of(kind[1])}, not {wanted[name][0]} {name_of(wanted[name][1])}"


def _block_results() -> _Kinds:
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    kinds["y"] = ((block.STEPS, block.BATCH, block.TOKENS, block.WIDTH), torch.float32)
    for name, (n_out, n_in) in block.LINEARS.items():
        kinds[f"{name}.delta"] = (n_out, block.RANK), torch.float32
        kinds[f"{name}.weight"] = (n_out, n_in), torch.float32
    return kinds


def _kinds(tensors: Mapping[str, Tensor]) -> _Kinds:
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
