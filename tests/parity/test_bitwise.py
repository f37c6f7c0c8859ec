"""Rule 9: where every partial sum is exactly representable, all backends and strategies give the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import paca
from paca.backend import Backend
from paca.layer import PacaLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

TOKENS, IN, OUT, R = 24, 40, 32, 6
# Bits of the significand: an integer below 2^bits is exact.
SIGNIFICAND = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def combinations(backend: type[Backend]):
    """The reference's every combination; of the others each strategy once, beside the defaults of other kinds."""
    kinds = {kind: list(names) for kind, names in backend.choices.items()}
    if backend.name == "cpu":
        for chosen in itertools.product(*kinds.values()):
            yield dict(zip(kinds, chosen, strict=True))
        return
    defaults = {kind: name for kind, name in backend().strategies.items() if kind in kinds}
    yield defaults
    for kind, names in kinds.items():
        yield from ({**defaults, kind: name} for name in names if name != defaults[kind])


def available():
    for name, why in paca.available_backends().items():
        for strategies in combinations(type(paca.set_backend(name))) if why is None else [{}]:
            skip = [pytest.mark.skip(reason=f"backend {name}: {why}")] if why else []
            # A graph holds no write, so the ways to write differ in eager mode only.
            for compiled in [False, True] if strategies.get("write") == "index_copy" else [False]:
                words = [name, *strategies.values(), "compile" if compiled else "eager"]
                yield pytest.param(name, strategies, compiled, id="-".join(words), marks=skip)


def sparse_integers(shape, generator, density=0.25):
    """Small integers, mostly zero, so that sums stay small."""
    values = torch.randint(-2, 3, shape, generator=generator)
    return (values * (torch.rand(shape, generator=generator) < density)).double()


def certify(a, b, dtype):
    """Assert that every partial sum of a @ b, in any order, is an exact integer of the dtype."""
    assert float((a.abs() @ b.abs()).max()) <= 2 ** SIGNIFICAND[dtype]


@torch.no_grad()
def exact_base(generator, dtype):
    """Make a linear layer of small integers."""
    base = nn.Linear(IN, OUT).requires_grad_(False)
    base.weight.copy_(sparse_integers((OUT, IN), generator))
    base.bias.copy_(torch.randint(-3, 4, (OUT,), generator=generator))
    return base.to(dtype)


def step(dtype, backend: Backend, residency, compiled):
    """One exact training step; returns everything it made."""
    generator = torch.Generator().manual_seed(3)
    base = exact_base(generator, dtype)
    layer = PacaLayer(base, "layer", backend, residency)
    layer.update_layer("default", torch.randperm(IN, generator=generator)[:R].sort().values, alpha=2 * R)
    delta = layer.paca_delta["default"]
    with torch.no_grad():
        delta.copy_(torch.randint(-1, 2, (OUT, R), generator=generator))
    layer.sync()
    x = sparse_integers((2, TOKENS // 2, IN), generator)
    gy = sparse_integers((2, TOKENS // 2, OUT), generator)

    weight = layer.pretrained_weight().double()
    weight[:, layer.paca_indices["default"]] += 2 * delta.detach().double()
    certify(x.reshape(-1, IN), weight.t(), dtype)
    certify(gy.reshape(-1, OUT), weight, dtype)
    certify(gy.reshape(-1, OUT).t(), x.reshape(-1, IN), torch.float32)

    x = x.to(dtype).requires_grad_(True)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    y = run(x)
    y.backward(gy.to(dtype))
    found = [y.detach().clone(), x.grad, delta.grad]
    torch.optim.SGD([delta], lr=0.5).step()
    held = layer.get_base_layer().weight.detach().clone()
    after = run(x.detach()).detach()
    exact = [
        x.detach().double() @ weight.t() + base.bias.double(),
        gy @ weight,
        2 * gy.reshape(-1, OUT).t() @ x.detach().double().reshape(-1, IN)[:, layer.paca_indices["default"]],
    ]
    return [*found, after, delta.detach()], exact, held


@pytest.mark.parametrize("dtype", list(SIGNIFICAND))
@pytest.mark.parametrize("residency", ["resident", "swap"])
@pytest.mark.parametrize(("name", "strategies", "compiled"), [*available()])
def test_one_step_has_the_same_bits_everywhere(name, strategies, compiled, residency, dtype):
    torch._dynamo.reset()
    reference, exact, held = step(dtype, paca.set_backend("cpu"), "resident", compiled=False)
    for made, wanted in zip(reference[:3], exact, strict=True):
        assert torch.equal(made.double(), wanted)  # the reference itself is exact
    found, _, found_held = step(dtype, paca.set_backend(name, **strategies), residency, compiled)
    for made, wanted in zip(found, reference, strict=True):
        assert made.dtype == wanted.dtype
        assert torch.equal(made, wanted)
    if residency == "resident":
        assert torch.equal(found_held, held)
