"""Gaudi's ways to gather and to write give the bits of the plain ones, with fixed shapes and nothing read back."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import Operations
from torch import nn

import paca
from paca.columns import runs_of
from paca.layer import PacaLayer
from paca.strategies import ColumnWrite, gather_index_select, gather_slices
from paca_hpu import HPUBackend, RehearsalBackend
from paca_hpu.cost import gather_table, one_hot_is_cheaper, overhead_table
from paca_hpu.gathers import gather_by_cost, gather_one_hot

READS_BACK = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "min", "max"}


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n_in=st.integers(1, 40),
    part=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_every_gather_gives_the_bits_of_index_select(lead, n_in, part, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, n_in, generator=generator).to(dtype)
    index = torch.randperm(n_in, generator=generator)[: 1 + int(part * (n_in - 1))].sort().values
    wanted = gather_index_select(x, index) if lead else x[index]
    for gather in (gather_one_hot, gather_by_cost):
        assert torch.equal(gather(x, index), wanted)
    assert torch.equal(gather_slices(x, runs_of(index.tolist())), wanted)


def test_one_hot_spreads_an_inf_within_its_token_and_no_further():
    x = torch.ones(3, 8)
    x[1, 0] = torch.inf
    found = gather_one_hot(x, torch.tensor([2, 5]))
    assert torch.equal(found[[0, 2]], torch.ones(2, 2))
    assert found[1].isnan().all()


def test_slices_do_not_keep_the_input():
    x = torch.randn(5, 8)
    assert gather_slices(x, ((2, 6),)).untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("numbers", [[], [3], [0, 1, 2], [0, 2, 4], [1, 2, 5, 6, 7, 9]])
def test_runs_say_the_same_as_the_numbers(numbers):
    runs = runs_of(numbers)
    assert [number for first, end in runs for number in range(first, end)] == numbers
    assert all(end < first for (_, end), (first, _) in pairwise(runs))  # none could be joined


def layer_on(backend, columns, n_in=16):
    layer = PacaLayer(nn.Linear(n_in, 8).requires_grad_(False), "layer", backend)
    layer.update_layer("default", torch.tensor(columns), alpha=len(columns))
    return layer


@pytest.mark.parametrize(
    ("gather", "columns", "wanted"),
    [
        ("auto", [4, 5, 6], "slice"),
        ("auto", [4, 6, 8], "index_select"),
        ("index_select", [4, 5, 6], "index_select"),
        ("one_hot", [4, 5, 6], "mm"),
        ("slice", [1, 4, 5, 9], "slice"),
    ],
)
def test_the_chosen_gather_is_what_runs(gather, columns, wanted):
    layer = layer_on(paca.set_backend("hpu-rehearsal", gather=gather), columns, n_in=2048)
    with Operations() as operations:
        layer(torch.randn(2, 2048))
    assert {"slice", "index_select", "mm"} & set(operations.names) == {wanted}


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("write", list(HPUBackend.choices["write"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_write_puts_the_same_bits_where_the_weight_already_is(write, conv1d, dtype):
    torch.manual_seed(0)
    weight = torch.randn(12, 20).to(dtype) if not conv1d else torch.randn(20, 12).to(dtype).t()
    index = torch.tensor([0, 3, 4, 19])
    base, delta = weight.index_select(1, index), torch.randn(12, 4)
    wanted = weight.clone()
    wanted[:, index] = (base + 0.5 * delta).to(dtype)
    address = weight.data_ptr()
    RehearsalBackend(write=write).ops.write_columns([ColumnWrite(weight, index, base, delta, 0.5)])
    assert torch.equal(weight, wanted)
    assert weight.data_ptr() == address


@pytest.mark.parametrize("gather", list(HPUBackend.choices["gather"]))
@pytest.mark.parametrize("write", list(HPUBackend.choices["write"]))
def test_a_step_reads_nothing_back_and_has_no_shape_that_depends_on_data(gather, write):
    layer = layer_on(paca.set_backend("hpu-rehearsal", gather=gather, write=write), [1, 2, 7])
    optimizer = torch.optim.SGD(layer.paca_delta.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(4, 16)
        with Operations() as operations:
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert operations.names
        assert READS_BACK & set(operations.names) == set(), step


def test_the_graph_ends_before_and_after_the_columns_of_a_step_are_written():
    told = []

    backend = RehearsalBackend()
    write = backend.ops.write_columns
    backend.ops = replace(
        backend.ops, end_graph=lambda: told.append("end"), write_columns=lambda w: (told.append(len(w)), write(w))
    )
    layers = [layer_on(backend, [1, 2]), layer_on(backend, [3])]
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters() if p.requires_grad], lr=0.1)
    sum(layer(torch.randn(2, 16)).sum() for layer in layers).backward()
    told.clear()
    optimizer.step()
    assert told == ["end", 2, "end"]


@pytest.mark.parametrize("n_in", [256, 4096, 14336])
def test_the_cheaper_gather_depends_on_the_layer_alone_and_changes_once_with_the_rank(n_in):
    chosen = [one_hot_is_cheaper(n_in, r) for r in range(1, 257)]
    assert chosen == sorted(chosen)  # index_select up to some rank, the product beyond it
    assert chosen[0] is False


def test_the_page_shows_what_the_cost_model_computes():
    page = (Path(__file__).parents[3] / "docs" / "gaudi.md").read_text(encoding="utf-8")
    assert "\n".join(gather_table()) in page
    assert "\n".join(overhead_table()) in page
