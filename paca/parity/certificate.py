"""Proves, while a computation runs, that no device may give other bits: nothing in it can round.

Each operation's result is compared with the same operation in float64: equal means it was not rounded to its dtype. For
sums and products the terms are counted in units of their last common binary place: if Σ|a||b| is at most 2^24 units,
every partial sum in any order, tree or split is an integer number of units that float32 holds. By induction over the
operations the whole computation has one possible result, wherever sums are formed in float32 or wider.

Float64 may only judge what it does not round itself, so elementwise sums must fit its 53 bits and factors that are
Python numbers must be float32's; products of two float32 fit always. A factor `alpha` is a power of two: some devices
round the product before they add it. What is written by index is written once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# Sums of products: the last two tensors are multiplied, what stands before them is added.
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.dot, aten.mv}
# Sums of elements.
_ADDITIONS = {aten.sum, aten.index_add, aten.index_add_}
# Each result comes of one element of each operand, so that there is no order: it is rounded, or it is not.
_ELEMENTWISE = {aten.add, aten.add_, aten.sub, aten.mul, aten.mul_, aten.div, aten.round, aten.clamp, aten.relu}
_ELEMENTWISE |= {aten.rsub, aten.neg, aten.threshold_backward, aten.where, aten.tril, aten.nan_to_num}
_ELEMENTWISE |= {aten._to_copy, aten._unsafe_view, aten.clone, aten.copy_, aten.fill_, aten.squeeze_}
_ELEMENTWISE |= {aten.flip, aten.roll, aten.cat, aten.stack, aten.index_select, aten.index_copy, aten.index_copy_}
_ELEMENTWISE |= {aten.index_fill, aten.index_fill_, aten.scatter_}
_ELEMENTWISE |= {aten.zeros, aten.zeros_like, aten.new_zeros, aten.ones, aten.eye, aten.scalar_tensor}
_PAIRWISE_SUMS = {aten.add, aten.add_, aten.sub, aten.rsub}
_INDEXED_WRITES = {aten.index_copy, aten.index_copy_, aten.scatter_}
_FLOAT64_BITS = 53
# Results that no number of the computation goes into: unwritten memory, random numbers, comparisons, column numbers.
_NO_VALUES = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_NO_VALUES |= {aten.uniform_, aten.normal_, aten.randint, aten.randperm}
_NO_VALUES |= {aten.equal, aten.eq, aten.ne, aten.bitwise_and, aten.promote_types}
_NO_VALUES |= {aten.sort, aten.nonzero, aten._unique2, aten.searchsorted, aten._local_scalar_dense}
_BOOKKEEPING = {"profiler"}  # namespaces


class NotExactError(ArithmeticError):
    """An operation rounds, or could round in another order; the message names it."""


class Certificate(TorchDispatchMode):
    """`with Certificate():` raises NotExactError at the first operation that is not exact in every order.

    Args:
        accumulator_bits: of the significand in which a device forms sums.

    Attributes:
        operations: how many were proved exact.
        largest: the largest Σ|a||b| so far in units of its last place, as a power of two.
    """

    def __init__(self, accumulator_bits: int = 24) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.accumulator_bits = accumulator_bits
        self.operations = 0
        self.largest = -math.inf

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and prove it exact."""
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func.is_view or packet in _NO_VALUES or func.namespace in _BOOKKEEPING:
            return func(*args, **kwargs)
        if packet not in _PRODUCTS | _ADDITIONS | _ELEMENTWISE:
            raise NotExactError(f"{func} is none of the operations that can be proved exact")
        wide_args = tree_map(_widened, args)  # before an in-place operation changes them
        wide_kwargs = {name: _wide_dtype(tree_map(_widened, value)) for name, value in kwargs.items()}
        if packet in _ELEMENTWISE:
            _check_elementwise(func, args, kwargs)
        else:
            self._check_sum(func, args, kwargs)
        result = func(*args, **kwargs)
        exact = func(*wide_args, **wide_kwargs)
        found = [result] if func._schema.returns else [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        wanted = [exact] if func._schema.returns else [w for w in tree_leaves(wide_args) if isinstance(w, Tensor)]
        for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
            if isinstance(a, Tensor) and a.is_floating_point() and not torch.equal(a.double(), b.double()):
                raise NotExactError(f"{func} rounds to {a.dtype}")
        self.operations += 1
        return result

    def _check_sum(self, func: Any, args: Any, kwargs: Any) -> None:
        """Bound every partial sum of an operation: on absolute values it gives Σ|a||b|."""
        if not {abs(kwargs.get(factor, 1)) for factor in ("alpha", "beta")} <= {1}:
            raise NotExactError(f"{func} with alpha or beta other than 1 and -1 cannot be proved exact")
        places = list(map(_last_place, _floating(args)))
        if not places:  # integers do not round
            return
        if func.overloadpacket in _PRODUCTS:
            places[-2:] = [places[-2] + places[-1]]
        wide = {name: _wide_dtype(value) for name, value in kwargs.items() if name not in ("alpha", "beta")}
        total = func(*tree_map(lambda x: _widened(x, absolute=True), args), **wide)
        highest = float(total.max()) if total.numel() else 0.0
        if highest == 0.0:
            return
        bits = math.log2(highest) - min(places)
        self.largest = max(self.largest, bits)
        if bits > self.accumulator_bits:
            raise NotExactError(
                f"{func}: a partial sum can need {math.ceil(bits)} bits, more than the {self.accumulator_bits} of the "
                "accumulator"
            )


def _check_elementwise(func: Any, args: Any, kwargs: Any) -> None:
    """See that float64 can judge an operation, and that it has one result."""
    packet, tensors = func.overloadpacket, _floating(args)
    for factor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, float)):
        if float(torch.tensor(factor, dtype=torch.float32)) != factor:
            raise NotExactError(f"{func} with {factor!r}, which rounds to torch.float32")
    alpha = kwargs.get("alpha", 1)
    if alpha and math.frexp(abs(alpha))[0] != 0.5:
        raise NotExactError(f"{func} with an alpha of {alpha}, no power of two: the product may be rounded or not")
    if packet in _PAIRWISE_SUMS and tensors:
        scalars = [torch.tensor(float(leaf)) for leaf in args if isinstance(leaf, (int, float))]
        terms = [*tensors, *scalars]
        largest = sum(float(term.abs().max()) for term in terms if term.numel()) * max(1, abs(alpha))
        lowest = min(map(_last_place, terms)) + min(0.0, math.log2(abs(alpha) or 1))
        if largest and math.log2(largest) - lowest > _FLOAT64_BITS:
            raise NotExactError(f"{func} needs more bits than float64 has")
    if packet in _INDEXED_WRITES:
        dim, index = args[1], args[2]
        in_order = index.sort(dim if index.dim() > 1 else 0).values
        if bool((in_order.diff(dim=dim if index.dim() > 1 else 0) == 0).any()):
            raise NotExactError(f"{func} writes one place twice, and the last to do so may be either")


def _floating(args: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _widened(x: Any, absolute: bool = False) -> Any:
    """Return a float64 copy of a floating-point tensor; anything else as it is."""
    if isinstance(x, Tensor) and x.is_floating_point():
        copy = x.detach().to(torch.float64, copy=True)
        return copy.abs() if absolute else copy
    return x


def _wide_dtype(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _last_place(x: Tensor) -> float:
    """Return the exponent of the last binary place that any element uses; inf for zeros."""
    values = x.detach().double().flatten()
    values = values[values != 0]
    if not len(values):
        return math.inf
    mantissa, exponent = torch.frexp(values)
    significand = (mantissa * 2.0**53).long()
    lowest = significand & -significand  # the lowest set bit
    return float((torch.frexp(lowest.double())[1] - 1 + exponent - 53).min())
