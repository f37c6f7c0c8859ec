"""Runs a case on a backend: each tensor operation by itself, and a whole layer with backward and optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from paca import freshness
from paca.backend import Backend, GraphMode, Ops
from paca.errors import BackendUnavailableError
from paca.layer import PacaLayer
from paca.parity.cases import Case
from paca.strategies import ColumnWrite

LEARNING_RATE = 0.5


def run_gather(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`x[..., index]`."""
    return {"gathered": ops.gather(_x(case, device), case.inputs["index"].to(device))}


def run_forward(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`x Wᵀ + b`."""
    weight, bias = case.expected["adapted"].to(device), case.inputs["bias"].to(device)
    return {"y": ops.forward(_x(case, device), weight, bias)}


def run_grad_input(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`gy W`."""
    return {"grad_input": ops.grad_input(_gy(case, device), case.expected["adapted"].to(device))}


def run_grad_columns(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`s·gyᵀ xs`."""
    gathered = case.inputs["x"][:, case.inputs["index"]].to(device)
    return {"grad_delta": ops.grad_columns(_gy(case, device), gathered.reshape(*case.lead, -1), case.scale)}


def run_write(case: Case, ops: Ops, device: torch.device) -> dict[str, Tensor]:
    """`W[:, index] = base + s·Δ`: two weights in one call, as a step of a model does."""
    weights = [case.inputs["weight"].to(device, copy=True) for _ in range(2)]
    index = case.inputs["index"].to(device)
    deltas = [case.inputs[key].to(device) for key in ("delta", "delta_after")]
    ops.write_columns(
        [
            ColumnWrite(weight, index, weight.index_select(1, index), delta, case.scale)
            for weight, delta in zip(weights, deltas, strict=True)
        ]
    )
    return {"adapted": weights[0], "adapted_after": weights[1]}


# The operation of each field of `Ops`.
OPERATIONS: dict[str, Callable[[Case, Ops, torch.device], dict[str, Tensor]]] = {
    "gather": run_gather,
    "forward": run_forward,
    "grad_input": run_grad_input,
    "grad_columns": run_grad_columns,
    "write_columns": run_write,
}


def run_operation(case: Case, field: str, backend: Backend) -> dict[str, Tensor]:
    """Run one of the operations; its results come by the names in `cases.OUTPUTS`, on the CPU, tokens flattened."""
    with torch.no_grad():
        return _collected(case, OPERATIONS[field](case, backend.ops, backend.device()), backend)


def run_layer(case: Case, backend: Backend, residency: str) -> dict[str, Tensor]:
    """Run one training step of a layer and what follows it.

    Forward, backward, a step of SGD, forward again without gradients, and the adapter switched off. A resident layer is
    captured in the backend's graph mode.

    Returns:
        By the names in `cases.OUTPUTS`, and "restored": the weight with the adapter off.
    """
    device, inputs = backend.device(), case.inputs
    base = nn.Linear(inputs["weight"].shape[1], inputs["weight"].shape[0], device="meta")
    base.weight = nn.Parameter(inputs["weight"].to(device, copy=True), requires_grad=False)
    base.bias = nn.Parameter(inputs["bias"].to(device, copy=True), requires_grad=False)
    layer = PacaLayer(base, case.name, backend, residency)
    try:
        layer.update_layer("default", inputs["index"], case.alpha)
        delta = layer.paca_delta["default"]
        with torch.no_grad():
            delta.copy_(inputs["delta"])
        layer.sync()
        if backend.graph_mode is not GraphMode.EAGER:
            forget_graphs()
        run = backend.capture(layer)
        found = {"adapted": _held_weight(layer, case, "delta")}
        x = _x(case, device).requires_grad_(True)
        y = run(x)
        y.backward(_gy(case, device))
        assert x.grad is not None
        assert delta.grad is not None
        found |= {"y": y.detach(), "grad_input": x.grad, "grad_delta": delta.grad.clone()}
        if backend.graph_mode is GraphMode.COMPILE:
            check_compiled()
        # The step that takes delta to delta_after, so that writing columns is tested apart from the gradient.
        delta.grad = ((inputs["delta"] - inputs["delta_after"]) / LEARNING_RATE).to(device)
        torch.optim.SGD([delta], lr=LEARNING_RATE).step()
        found["adapted_after"] = _held_weight(layer, case, "delta_after")
        with torch.no_grad():
            found["y_after"] = run(x.detach())
        layer.enable_adapters(False)
        found["restored"] = base.weight.detach().clone()
        return _collected(case, found, backend)
    finally:
        freshness.forget(layer)


def forget_graphs() -> None:
    """Let torch.compile start anew: after some layers it gives up and runs eagerly."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()


def check_compiled() -> None:
    """See that torch.compile took what ran since `forget_graphs` as whole graphs; it may run eagerly in silence.

    Raises:
        BackendUnavailableError: if it is switched off.
        RuntimeError: if a graph broke.
    """
    from torch._dynamo.utils import counters

    if breaks := counters["graph_break"]:
        raise RuntimeError(f"torch.compile broke the graph: {next(iter(breaks))}")
    if not counters["stats"]["unique_graphs"]:
        raise BackendUnavailableError("torch.compile compiles nothing here (TORCHDYNAMO_DISABLE?)")


def _held_weight(layer: PacaLayer, case: Case, delta: str) -> Tensor:
    """Return the weight that the layer computes with; a swapping one has it for a moment only, so it is written anew.

    `delta`: the input that says what it should hold.
    """
    if layer.residency == "resident":
        return layer.get_base_layer().weight.detach().clone()
    weight, index = case.inputs["weight"].to(layer.get_base_layer().weight.device, copy=True), layer.paca_indices
    base = weight.index_select(1, index["default"])
    values = case.inputs[delta].to(weight.device)
    layer.adapted.ops.write_columns([ColumnWrite(weight, index["default"], base, values, case.scale)])
    return weight


def _x(case: Case, device: torch.device) -> Tensor:
    return case.inputs["x"].to(device, copy=True).reshape(*case.lead, -1)


def _gy(case: Case, device: torch.device) -> Tensor:
    return case.inputs["gy"].to(device, copy=True).reshape(*case.lead, -1)


def _collected(case: Case, found: dict[str, Tensor], backend: Backend) -> dict[str, Tensor]:
    """Wait for the device and fetch what it computed, tokens flattened."""
    backend.synchronize()
    return {
        name: value.detach().cpu().reshape(-1, value.shape[-1]) if value.dim() > 2 else value.detach().cpu()
        for name, value in found.items()
    }
