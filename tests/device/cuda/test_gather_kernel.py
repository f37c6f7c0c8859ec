"""The gather kernel returns x[..., index], whatever the shape, stride and dtype."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paca_cuda.strategies import gather_triton

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@QUICK
@given(
    lead=st.lists(st.integers(0, 9), max_size=3),
    n_in=st.integers(1, 70),
    part=st.floats(0.01, 1.0),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels first", "every other token"]),
)
def test_it_picks_exactly_the_channels(device, lead, n_in, part, dtype, layout):
    if layout == "channels first":
        x = torch.randn(n_in, *lead).movedim(0, -1)
    elif layout == "every other token" and lead:
        x = torch.randn(2 * lead[0], *lead[1:], n_in)[::2]
    else:
        x = torch.randn(*lead, n_in)
    x = x.to(device, dtype)
    index = torch.randperm(n_in)[: max(1, int(part * n_in))].sort().values.to(device)
    found = gather_triton(x, index)
    assert found.is_contiguous()
    assert torch.equal(found, x[..., index])


def test_a_channel_that_is_not_picked_does_not_matter(device):
    x = torch.full((4, 6), float("nan"), device=device)
    x[:, 2] = 3.0
    assert torch.equal(gather_triton(x, torch.tensor([2], device=device)), torch.full((4, 1), 3.0, device=device))


def test_offsets_beyond_32_bits_are_right(device):
    """Only a few bytes of the huge storage are touched, so on a CPU no memory is taken."""
    stride = 2**30 + 8  # fits in 32 bits; twice it does not
    x = torch.empty(2 * stride + 64, dtype=torch.uint8, device=device).as_strided((3, 64), (stride, 1))
    rows = torch.randint(0, 255, (3, 64), dtype=torch.uint8)
    for token in range(3):
        x[token] = rows[token].to(device)
    index = torch.tensor([0, 5, 63], device=device)
    assert torch.equal(gather_triton(x, index).cpu(), rows[:, index.cpu()])


def test_it_is_a_well_behaved_operator(device):
    x = torch.randn(3, 5, 12, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.paca.gather, (x, torch.tensor([1, 4, 7], device=device)))


def test_its_gradient_goes_to_the_picked_channels(device):
    x = torch.randn(3, 5, device=device, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 3], device=device)
    assert torch.autograd.gradcheck(lambda x: gather_triton(x, index), (x,))
