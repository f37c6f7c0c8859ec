"""Makes a record: draws the numbers, proves that the exact ones are, and runs the rest on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from paca.backend import Backend, Ops
from paca.parity.block import draw_block, train_block
from paca.parity.cases import BITWISE, BOUNDED, Case, new_cases
from paca.parity.certificate import Certificate
from paca.parity.coverage import dtypes_of
from paca.parity.exact import accumulator_bits
from paca.parity.operations import OPERATIONS, run_operation
from paca.parity.record import Record, environment
from paca.parity.training_step import run_layer
from paca.parity.trajectory import DTYPES, calibrated, draw_model
from paca.registry import use_backend
from paca.strategies import grad_input_addmm

# The reference of exact results: float64 arithmetic and the certificate need a CPU that has both.
EXACT_BACKEND = "cpu"
TOGETHER = Ops(grad_input_sum=grad_input_addmm)


def make_record(backend: Backend, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Record:
    """Make a record of what this machine computes with a backend as it is set up.

    Args:
        backend: runs the bounded and the trajectory tier; what the bitwise tier must give needs no device.
        seed: of all numbers.
        say: gets a line as each part begins.
    """
    dtypes = dtypes_of(backend.name)
    cases: list[Case] = []
    block = draw_block(seed)
    with use_backend(EXACT_BACKEND) as exact:
        for dtype in dtypes:
            say(f"layers and block in {dtype}, and the proof that they are exact")
            for case in new_cases(dtype, seed):
                cases.append(computed(case, backend) if case.tier == BOUNDED else case)
                if case.tier == BITWISE:
                    with Certificate(accumulator_bits(dtype)):
                        run_layer(case, exact, "resident")
                        run_layer(case, exact, "resident", stacked=True)
                        OPERATIONS["grad_input_sum"].run(case, TOGETHER, torch.device("cpu"))
            with Certificate(accumulator_bits(dtype)):
                trained = train_block(block, dtype, exact)
    model = draw_model(seed)
    runs = {}
    for dtype in DTYPES:
        if dtype in dtypes:
            say(f"a trajectory in {dtype}, and its tolerance")
            runs[dtype] = calibrated(model, dtype, backend)
    return Record(
        made_by=environment(backend),
        cases=tuple(cases),
        block=block,
        block_expected=trained,
        block_dtypes=dtypes,
        model=model,
        trajectories={dtype: reference for dtype, (reference, _) in runs.items()},
        tolerances={dtype: tolerance for dtype, (_, tolerance) in runs.items()},
    )


def computed(case: Case, backend: Backend) -> Case:
    """Return a case with what a backend computes as its expected results.

    An operation that it does not have is left as float64 rounds it.
    """
    found: dict[str, torch.Tensor] = {}
    found |= run_operation(case, "write_columns", backend)
    case = replace(case, expected={**case.expected, **found})  # the products below use the weight as written here
    for field in OPERATIONS:
        if getattr(backend.ops, field) is not None:
            found |= run_operation(case, field, backend)
    layer = run_layer(case, backend, "resident")
    rest = case.expected.keys() & layer.keys() - found.keys()
    return replace(case, expected={**case.expected, **found, **{name: layer[name] for name in rest}})
