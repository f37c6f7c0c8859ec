"""What is compared: layers with their numbers, and what must come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paca.parity.exact import draw, draw_index
from paca.parity.formats import name_of
from paca.parity.layouts import LAYOUTS, Bias, Layout, Storage
from paca.parity.truth import columns_exact, truths
from paca.strategies import adapted_columns

BITWISE, BOUNDED, TRAJECTORY = "bitwise", "bounded", "trajectory"
TIERS = (BITWISE, BOUNDED, TRAJECTORY)


@dataclass(frozen=True)
class Case:
    """One layer, one dtype, one tier.

    Attributes:
        name: e.g. "bitwise/odd/bfloat16".
        tier: "bitwise" or "bounded".
        dtype: that the layer computes in.
        lead: the leading sizes of x, whose product is the number of tokens.
        alpha: the update is scaled by alpha / r.
        storage: how the layer keeps its weight; here all weights are (out, in).
        bias: what the layer does with its bias.
        inputs: x (tokens, in), gy (tokens, out), weight (out, in) and, unless there is none, bias (out,) in `dtype`;
            index (r,) int64; delta and delta_after (out, r) float32.
        expected: by the names that `truth.truths` gives: what the recording machine computed. In the bitwise tier that
            is what every machine must.
    """

    name: str
    tier: str
    dtype: torch.dtype
    lead: tuple[int, ...]
    alpha: float
    storage: Storage
    bias: Bias
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return self.alpha / len(self.inputs["index"])

    @property
    def input_names(self) -> tuple[str, ...]:
        """What `inputs` holds."""
        bias = () if self.bias is Bias.NONE else ("bias",)
        return "x", "gy", "weight", *bias, "index", "delta", "delta_after"

    @property
    def output_names(self) -> tuple[str, ...]:
        """What `expected` holds."""
        bias = ("grad_bias",) if self.bias is Bias.TRAINED else ()
        of_input = "gathered", "y", "grad_input", "grad_input_sum"
        return *of_input, "adapted", "grad_delta", *bias, "adapted_after", "y_after"


def new_cases(dtype: torch.dtype, seed: int = 0) -> Iterator[Case]:
    """Make the cases of a dtype, all layouts in both tiers; the same on every machine with this version of torch."""
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        yield exact_case(f"{BITWISE}/{name}/{name_of(dtype)}", layout, dtype, generator)
        yield real_case(f"{BOUNDED}/{name}/{name_of(dtype)}", layout, dtype, generator)


def exact_case(name: str, layout: Layout, dtype: torch.dtype, generator: torch.Generator) -> Case:
    """Make a case of the bitwise tier."""
    numbers = draw(layout.shape, dtype, generator, layout.wide, layout.bias is Bias.TRAINED)
    case = Case(name, BITWISE, dtype, layout.lead, numbers.alpha, layout.storage, layout.bias, {}, {})
    case = replace(case, inputs={key: _stored(getattr(numbers, key), key, dtype) for key in case.input_names})
    return _with_results(case, *(columns_exact(case, after) for after in (False, True)))


def real_case(name: str, layout: Layout, dtype: torch.dtype, generator: torch.Generator) -> Case:
    """Make a case of the bounded tier; its results are correctly rounded ones until a machine records its own."""
    shape = layout.shape
    alpha = shape.rank * 2 / 3  # a scale that rounds
    case = Case(name, BOUNDED, dtype, layout.lead, alpha, layout.storage, layout.bias, {}, {})
    sizes = {
        "x": (shape.tokens, shape.n_in),
        "gy": (shape.tokens, shape.n_out),
        "weight": (shape.n_out, shape.n_in),
        "bias": (shape.n_out,),
        "delta": (shape.n_out, shape.rank),
        "delta_after": (shape.n_out, shape.rank),
    }
    drawn = {key: torch.randn(size, generator=generator, dtype=torch.float64) for key, size in sizes.items()}
    for key in ("delta", "delta_after"):  # on a grid, so that an optimizer's step from one to the other is exact
        drawn[key] = (drawn[key] * 2**12).round() / 2**12
    drawn["index"] = draw_index(shape, generator)
    case = replace(case, inputs={key: _stored(drawn[key], key, dtype) for key in case.input_names})
    return _with_results(case, *(adapted_weight(case, after) for after in (False, True)))


def adapted_weight(case: Case, after: bool) -> Tensor:
    """Return the weight with its adapted columns, before or after the optimizer's step, as the CPU writes it."""
    base = case.inputs["weight"][:, case.inputs["index"]]
    columns = adapted_columns(base, case.inputs["delta_after" if after else "delta"], case.scale)
    return case.inputs["weight"].index_copy(1, case.inputs["index"], columns)


def _with_results(case: Case, adapted: Tensor, adapted_after: Tensor) -> Case:
    """Return the case with the exact results, rounded once, as those expected."""
    found = truths(case, adapted, adapted_after)
    return replace(case, expected={key: found[key].exact.to(found[key].dtype) for key in case.output_names})


def _stored(values: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """Round to the dtype that an input comes in."""
    if key == "index":
        return values
    return values.to(torch.float32 if key.startswith("delta") else dtype)
