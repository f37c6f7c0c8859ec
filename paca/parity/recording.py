"""Makes a record: draws the numbers, proves that the exact ones are, and runs the rest on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from paca.backend import Backend
from paca.parity.block import draw_block, train_block
from paca.parity.cases import BITWISE, BOUNDED, Case, new_cases
from paca.parity.certificate import Certificate
from paca.parity.coverage import dtypes_of
from paca.parity.record import Record, environment
from paca.parity.replay import OPERATIONS, run_layer, run_operation
from paca.parity.trajectory import DTYPES, calibrated, draw_model
from paca.registry import use_backend

# The reference of exact results: float64 arithmetic and the certificate need a CPU that has both.
EXACT_BACKEND = "cpu"


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
                    with Certificate():
                        run_layer(case, exact, "resident")
            with Certificate():
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
    """Return a case with what a backend computes as its expected results."""
    found: dict[str, torch.Tensor] = {}
    found |= run_operation(case, "write_columns", backend)
    case = replace(case, expected={**case.expected, **found})  # the products below use the weight as written here
    for field in OPERATIONS:
        found |= run_operation(case, field, backend)
    layer = run_layer(case, backend, "resident")
    found |= {name: layer[name] for name in case.expected if name not in found}
    return replace(case, expected=found)
