"""One launch writes the columns of all weights, with the bits of the plain strategy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paca.strategies import ColumnWrite, write_index_copy
from paca_cuda import ops
from paca_cuda.strategies import write_multi_tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_write(device, n_out=9, n_in=12, r=3, dtype=torch.bfloat16, delta_dtype=torch.float32, scale=0.3, conv1d=False):
    weight = torch.randn(n_in, n_out).t() if conv1d else torch.randn(n_out, n_in)
    weight = weight.to(dtype).to(device)
    index = torch.randperm(n_in)[:r].sort().values.to(device)
    delta = (torch.randn(n_out, r) * 0.1).to(delta_dtype).to(device)
    return ColumnWrite(weight, index, weight.index_select(1, index), delta, scale)


def assert_written_as_by_the_plain_strategy(writes):
    expected = [replace(write, weight=write.weight.clone()) for write in writes]
    write_index_copy(expected)
    write_multi_tensor(writes)
    for found, wanted in zip(writes, expected, strict=True):
        assert torch.equal(found.weight, wanted.weight)


LAYERS = st.lists(
    st.fixed_dictionaries(
        {
            "n_out": st.integers(1, 150),
            "r": st.integers(1, 40),
            "dtype": st.sampled_from(DTYPES),
            "delta_dtype": st.sampled_from(DTYPES),
            "scale": st.sampled_from([1.0, 0.3, -2.0]),
            "conv1d": st.booleans(),
        }
    ),
    min_size=2,
    max_size=5,
)


@QUICK
@given(layers=LAYERS)
def test_all_layers_get_the_bits_of_the_plain_strategy(device, layers):
    ops._tables.clear()
    assert_written_as_by_the_plain_strategy([make_write(device, n_in=48, **layer) for layer in layers])


def test_the_product_is_rounded_before_the_sum(device):
    """A fused multiply-add would round once: 1 + 2⁻²⁴·(1 + 2⁻²³) becomes 1 + 2⁻²³ instead of 1."""
    base = torch.tensor([[1.0]], device=device)
    delta = torch.tensor([[1.0 + 2.0**-23]], device=device)
    writes = [
        ColumnWrite(torch.zeros(1, 2, device=device), torch.tensor([1], device=device), base, delta, 2.0**-24 * 0.99999)
        for _ in range(2)
    ]
    assert_written_as_by_the_plain_strategy(writes)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, -0.0])
def test_odd_values_are_written_as_torch_writes_them(device, value):
    writes = [make_write(device) for _ in range(2)]
    writes[0].delta[0, 0] = value
    expected = [replace(write, weight=write.weight.clone()) for write in writes]
    write_index_copy(expected)
    write_multi_tensor(writes)
    assert torch.equal(writes[0].weight.nan_to_num(), expected[0].weight.nan_to_num())
    assert torch.equal(writes[0].weight.isnan(), expected[0].weight.isnan())


def test_one_launch_writes_a_whole_model_and_its_table_is_built_once(device, monkeypatch):
    launches = []
    launch = ops._launch_write
    monkeypatch.setattr(ops, "_launch_write", lambda writes: (launches.append(len(writes)), launch(writes))[-1])
    writes = [make_write(device, n_out=n) for n in (5, 70, 9)]
    for _ in range(3):
        for write in writes:
            write.delta.mul_(-2)
        assert_written_as_by_the_plain_strategy(writes)
    assert launches == [3, 3, 3]
    assert len(ops._tables) == 1


def test_a_tensor_that_moved_gets_a_new_table(device):
    writes = [make_write(device) for _ in range(2)]
    assert_written_as_by_the_plain_strategy(writes)
    keep_alive = writes[0]
    writes[0] = replace(writes[0], delta=writes[0].delta.clone() + 1)
    assert_written_as_by_the_plain_strategy(writes)
    assert keep_alive.delta.data_ptr() != writes[0].delta.data_ptr()


def test_tables_of_the_past_are_dropped(device):
    kept = [[make_write(device, n_out=1 + n) for _ in range(2)] for n in range(ops._TABLES_KEPT + 3)]
    for writes in kept:
        write_multi_tensor(writes)
    assert len(ops._tables) == ops._TABLES_KEPT


def test_torch_sees_that_the_weights_changed(device):
    writes = [make_write(device) for _ in range(2)]
    before = [write.weight._version for write in writes]
    write_multi_tensor(writes)
    assert all(write.weight._version > version for write, version in zip(writes, before, strict=True))


def test_offsets_beyond_32_bits_are_right(device):
    stride = 2**30 + 8  # fits in 32 bits; twice it does not
    weight = torch.empty(2 * stride + 8, dtype=torch.float16, device=device).as_strided((3, 8), (stride, 1))
    weight[:] = 1.0
    index = torch.tensor([2, 7], device=device)
    write = ColumnWrite(weight, index, torch.ones(3, 2, device=device).half(), torch.ones(3, 2, device=device), 1.0)
    write_multi_tensor([write, make_write(device, dtype=torch.float16)])
    assert weight.tolist() == [[1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 2.0]] * 3


def test_it_is_a_well_behaved_operator(device):
    writes = [make_write(device) for _ in range(2)]
    arguments = zip(*((w.weight, w.index, w.base, w.delta, w.scale) for w in writes), strict=True)
    torch.library.opcheck(torch.ops.paca.write_columns, tuple(list(column) for column in arguments))
