"""Runs a whole layer on the numbers of a case: forward, backward, optimizer step, adapter off."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca import freshness
from paca.backend import Backend, GraphMode
from paca.errors import BackendUnavailableError
from paca.layer import PacaLayer
from paca.parity.cases import Case
from paca.parity.layouts import Bias, Storage
from paca.parity.operations import collected, gy_of, x_of

LEARNING_RATE = 0.5
RESTORED = "restored"  # the weight with the adapter off


class Share(NamedTuple):
    """One adapter's part of a case: some of its columns, and a factor for the deltas that it shares with another."""

    start: int
    stop: int
    factor: float

    def of(self, values: Tensor, shares: tuple[Share, ...]) -> Tensor:
        """Return this adapter's part of deltas (out, r): the parts of all adapters add up to them."""
        part = values[:, self.start : self.stop].clone()
        for other in shares:
            if other is not self:
                first, last = max(self.start, other.start), min(self.stop, other.stop)
                part[:, first - self.start : last - self.start] *= self.factor
        return part


def layer_results(case: Case) -> tuple[str, ...]:
    """Name what `run_layer` gives."""
    return *(name for name in case.output_names if name not in ("gathered", "grad_input_sum")), RESTORED


def run_layer(case: Case, backend: Backend, residency: str, stacked: bool = False) -> dict[str, Tensor]:
    """Run one training step of a layer and what follows it.

    Forward, backward, a step of SGD, forward again without gradients, and the adapter switched off. A resident layer is
    captured in the backend's graph mode.

    Args:
        case: what to run.
        backend: on which.
        residency: "resident" or "swap".
        stacked: with two adapters, some of whose columns are the same, that add up to the case's one. Exact numbers
            stay exact; others are rounded once more.

    Returns:
        `layer_results` by name.
    """
    device, inputs = backend.device(), case.inputs
    base = _base_layer(case, device)
    layer = PacaLayer(base, case.name, backend, residency)
    shares = _shares(len(inputs["index"]), stacked)
    names = [f"adapter{number}" for number, _ in enumerate(shares)]
    try:
        for name, share in zip(names, shares, strict=True):
            index = inputs["index"][share.start : share.stop]
            layer.update_layer(name, index, case.scale * len(index))
        layer.set_adapter(names)
        deltas = [layer.paca_delta[name] for name in names]
        with torch.no_grad():
            for delta, share in zip(deltas, shares, strict=True):
                delta.copy_(share.of(inputs["delta"], shares))
        layer.sync()
        if case.bias is Bias.TRAINED:
            base.bias.requires_grad_(True)
        if backend.graph_mode is not GraphMode.EAGER:
            forget_graphs()
        run = backend.capture(layer)
        found = {"adapted": _multiplied_weight(layer)}
        x = x_of(case, device).requires_grad_(True)
        y = run(x)
        y.backward(gy_of(case, device))
        assert x.grad is not None
        found |= {"y": y.detach(), "grad_input": x.grad, "grad_delta": _joined(deltas, shares)}
        if case.bias is Bias.TRAINED:
            found["grad_bias"] = base.bias.grad
        if backend.graph_mode is GraphMode.COMPILE:
            check_compiled()
        # The step that takes delta to delta_after, so that writing columns is tested apart from the gradient.
        for delta, share in zip(deltas, shares, strict=True):
            way = (inputs["delta"] - inputs["delta_after"]) / LEARNING_RATE
            delta.grad = share.of(way, shares).to(device)
        torch.optim.SGD(deltas, lr=LEARNING_RATE).step()
        found["adapted_after"] = _multiplied_weight(layer)
        with torch.no_grad():
            found["y_after"] = run(x.detach())
        layer.enable_adapters(False)
        found[RESTORED] = layer.adapted.matrix.detach().clone()
        return collected(case, found, backend)
    finally:
        freshness.forget(layer)


def _base_layer(case: Case, device: torch.device) -> Any:
    """Make the layer with the pretrained weight."""
    n_out, n_in = case.inputs["weight"].shape
    has_bias = case.bias is not Bias.NONE
    conv1d = case.storage is Storage.CONV1D
    base = Conv1D(n_out, n_in) if conv1d else nn.Linear(n_in, n_out, bias=has_bias, device="meta")
    # Contiguous in the layer's own layout.
    weight = case.inputs["weight"].t().contiguous() if conv1d else case.inputs["weight"]
    base.weight = nn.Parameter(weight.to(device, copy=True), requires_grad=False)
    if has_bias:
        base.bias = nn.Parameter(case.inputs["bias"].to(device, copy=True), requires_grad=False)
    return base


def _shares(r: int, stacked: bool) -> tuple[Share, ...]:
    if not stacked:
        return (Share(0, r, 1.0),)
    third = r // 3
    return Share(0, r - third, 3.0), Share(third, r, -2.0)


def _joined(deltas: list[Tensor], shares: tuple[Share, ...]) -> Tensor:
    """Put the gradients of all adapters together, (out, r).

    Raises:
        ArithmeticError: if two adapters have different gradients of one column.
    """
    grads = [delta.grad for delta in deltas if delta.grad is not None]
    joined = grads[0]
    for share, grad in zip(shares[1:], grads[1:], strict=True):
        both = joined.shape[1] - share.start
        if not torch.equal(joined[:, share.start :], grad[:, :both]):
            raise ArithmeticError("two adapters that train the same columns have different gradients of them")
        joined = torch.cat([joined, grad[:, both:]], dim=1)
    return joined.clone()


def _multiplied_weight(layer: PacaLayer) -> Tensor:
    """Return the weight that the layer computes with, (out, in).

    A swapping layer has it for a moment only; there backward shows it, as the product of an identity with it.
    """
    if layer.residency == "resident":
        return layer.adapted.matrix.detach().clone()
    weight = layer.adapted.matrix
    x = weight.new_zeros(weight.shape, requires_grad=True)
    y = layer(x)
    return torch.autograd.grad(y, x, torch.eye(len(weight), dtype=y.dtype, device=y.device))[0]


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
