"""The kernel of s·dYᵀ Xs stays within the rounding bound of float64, for every tiling, and repeats its bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paca_cuda import ops
from paca_cuda.graphs import record_cuda_graph
from paca_cuda.ops import (
    DEFAULT_TILING,
    LARGEST_RANK,
    SHARED_BYTES,
    TILINGS,
    Tiling,
    safe_tiling,
    takes_tf32,
    tiled_grad_columns,
)
from paca_cuda.strategies import grad_columns_cublas, grad_columns_triton, grad_columns_tuned

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = Tiling(out=16, tokens=16, programs=16, warps=4, stages=2)  # so that small problems are split
HALF_UNIT = 2.0**-24  # of float32, in which sums are formed


def assert_within_bound(found, gy, xs, scale):
    """|found − exact| ≤ γ·|s|·|gyᵀ||xs|, one rounding for each token and two for sum and scale."""
    gy, xs = gy.double().cpu().flatten(0, -2), xs.double().cpu().flatten(0, -2)
    exact = scale * gy.t() @ xs
    unit = HALF_UNIT if found.dtype == torch.float32 else 2.0**-53
    roundings = 2 * (len(gy) + 3) * unit  # tensor cores may truncate: twice the unit
    bound = roundings / (1 - roundings) * (abs(scale) * gy.abs().t() @ xs.abs()) + 1e-30
    excess = ((found.double().cpu() - exact).abs() - bound).max() if found.numel() else torch.tensor(0.0)
    assert excess <= 0, f"largest excess {excess:.2e}"


@QUICK
@given(
    tokens=st.integers(1, 150),
    n_out=st.integers(1, 40),
    r=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 0.5, -3.0]),
    strided=st.booleans(),
)
def test_any_shape_is_within_the_bound(device, tokens, n_out, r, dtype, scale, strided):
    gy = torch.randn(n_out, tokens).t() if strided else torch.randn(tokens, n_out)
    xs = torch.randn(tokens, r + 3)[:, 1 : r + 1] if strided else torch.randn(tokens, r)
    gy, xs = gy.to(device, dtype), xs.to(device, dtype)
    found = tiled_grad_columns(gy, xs, scale, SMALL)
    assert found.shape == (n_out, r)
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert_within_bound(found, gy, xs, scale)


@pytest.mark.parametrize("strategy", [grad_columns_triton, grad_columns_tuned, grad_columns_cublas])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 9)])
def test_every_strategy_takes_any_number_of_axes(device, strategy, dtype, lead):
    gy, xs = torch.randn(*lead, 10, device=device).to(dtype), torch.randn(*lead, 6, device=device).to(dtype)
    found = strategy(gy, xs, 2.0)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert_within_bound(found, gy.reshape(-1, 10), xs.reshape(-1, 6), 2.0)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling_is_within_the_bound_and_repeats_its_bits(device, tiling):
    gy, xs = torch.randn(1100, 70, device=device).bfloat16(), torch.randn(1100, 12, device=device).bfloat16()
    assert tiling.split(1100, 70) > 1
    found = tiled_grad_columns(gy, xs, 1.0, tiling)
    assert_within_bound(found, gy, xs, 1.0)
    assert all(torch.equal(tiled_grad_columns(gy, xs, 1.0, tiling), found) for _ in range(2))


def test_sums_are_in_float32_also_across_parts(device):
    """4096 equal terms: sums that are rounded to bfloat16 stop growing at 256."""
    gy, xs = torch.ones(4096, 16, device=device).bfloat16(), torch.ones(4096, 16, device=device).bfloat16()
    assert DEFAULT_TILING.split(4096, 16) > 1
    assert torch.equal(grad_columns_triton(gy, xs), torch.full((16, 16), 4096.0, device=device))


def test_a_large_rank_goes_to_cublas(device):
    gy, xs = torch.randn(20, 8, device=device), torch.randn(20, LARGEST_RANK + 1, device=device)
    assert_within_bound(grad_columns_triton(gy, xs), gy, xs, 1.0)


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_nothing_gives_zeros(device, shape):
    tokens, n_out, r = shape
    found = torch.ops.paca.grad_columns(
        torch.randn(tokens, n_out, device=device), torch.randn(tokens, r, device=device), 1.0, True
    )
    assert torch.equal(found, torch.zeros(n_out, r, device=device))


def test_offsets_beyond_32_bits_are_right(device):
    stride = 2**30 + 8  # fits in 32 bits; twice it does not
    gy = torch.empty(2 * stride + 16, dtype=torch.float16, device=device).as_strided((3, 16), (stride, 1))
    rows = torch.randn(3, 16).half()
    for token in range(3):
        gy[token] = rows[token].to(device)
    xs = torch.randn(3, 4, device=device).half()
    assert_within_bound(tiled_grad_columns(gy, xs, 1.0, SMALL), rows, xs, 1.0)


@given(tokens=st.integers(1, 2**18), n_out=st.integers(1, 2**17), tiling=st.sampled_from(TILINGS))
def test_tokens_are_split_into_a_power_of_two_of_parts_that_are_worth_it(tokens, n_out, tiling):
    split = tiling.split(tokens, n_out)
    assert split & (split - 1) == 0
    assert 1 <= split <= 64
    assert split == 1 or tokens / split >= 4 * tiling.tokens
    assert split == 1 or split * -(-n_out // tiling.out) <= tiling.programs


@given(r=st.integers(1, LARGEST_RANK), element_size=st.sampled_from([2, 4]))
def test_what_is_taken_untimed_fits_every_device(r, element_size):
    assert safe_tiling(r, element_size).shared_bytes(r, element_size) <= SHARED_BYTES


def test_usual_ranks_take_the_default_tiling():
    assert all(safe_tiling(r, 2) is DEFAULT_TILING for r in (4, 8, 64, 128))


@pytest.mark.parametrize("r", [129, 256])
def test_the_largest_ranks_are_within_the_bound(device, r):
    gy, xs = torch.randn(130, 24, device=device), torch.randn(130, r, device=device)
    assert_within_bound(tiled_grad_columns(gy, xs, 1.0, safe_tiling(r, 4)), gy, xs, 1.0)


class Tuned:
    """Stands in for the tuner of a device."""

    def __init__(self, fails=False, **known):
        self.asked, self.fails, self.found = 0, fails, known
        self.launched = []

    def known(self, problem):
        (tokens,) = [word for word in problem.split() if word.startswith("tokens")]
        return self.found.get(tokens.replace("≤", "_"))

    def choose(self, problem, candidates):
        self.asked += 1
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "cublas" if "cublas" in candidates else str(TILINGS[1])


@pytest.fixture
def tuned(monkeypatch):
    """Let tensors of the CPU pass for those of a device, whose tuner is a stand-in."""

    def pretend(tuner):
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(ops, "_tuner", lambda device: tuner)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: tuner.capturing)
        monkeypatch.setattr(ops, "LAUNCH_BOUND", 0)
        monkeypatch.setattr(ops, "tiled_grad_columns", lambda gy, xs, scale, tiling: tuner.launched.append(tiling))
        tuner.capturing = False
        return tuner

    return pretend


def test_each_problem_is_decided_once_in_a_process(tuned):
    tuner, gy, xs = tuned(Tuned()), torch.empty(64, 48), torch.empty(64, 8)
    for _ in range(3):
        assert ops._tiling_for(gy, xs, 1.0, False) is None  # cuBLAS
        assert ops._tiling_for(gy, xs, 1.0, True) == TILINGS[1]
    assert tuner.asked == 2
    for other in (torch.empty(65, 48), torch.empty(64, 40), torch.empty(48, 64).t(), torch.empty(64, 48).bfloat16()):
        ops._tiling_for(other, xs, 1.0, False)
    assert tuner.asked == 6


def test_the_host_launches_cublas_for_a_small_problem_and_a_graph_what_is_fastest(tuned, monkeypatch):
    tuner, xs = tuned(Tuned(tokens_64=str(TILINGS[3]), tokens_128=str(TILINGS[3]))), torch.empty(64, 8)
    monkeypatch.setattr(ops, "LAUNCH_BOUND", 64 * 48)
    small, large = torch.empty(64, 48), torch.empty(65, 48)
    assert [ops._tiling_for(large, xs, 1.0, False) for _ in range(3)] == [TILINGS[3]] * 3
    assert [ops._tiling_for(small, xs, 1.0, False) for _ in range(3)] == [None, None, None]
    assert tuner.launched == [TILINGS[3]]  # to be loaded when a graph is captured
    tuner.capturing = True
    assert ops._tiling_for(small, xs, 1.0, False) == TILINGS[3]


def test_a_capture_launches_nothing_that_would_have_to_be_loaded(tuned, monkeypatch):
    tuner, xs = tuned(Tuned(tokens_64=str(TILINGS[3]))), torch.empty(64, 8)
    monkeypatch.setattr(ops, "LAUNCH_BOUND", 64 * 48)
    ops._tiling_for(torch.empty(64, 48), xs, 1.0, False)
    tuner.capturing = True
    for gy in (torch.empty(60, 48), torch.empty(48, 64).t(), torch.empty(64 * 48 + 1)[1:].view(64, 48)):
        assert ops._tiling_for(gy, xs, 1.0, False) is None


def test_what_a_capture_meets_first_is_not_decided_there(tuned):
    tuner, gy, xs = tuned(Tuned()), torch.empty(64, 48), torch.empty(64, 8)
    tuner.capturing = True
    assert ops._tiling_for(gy, xs, 1.0, False) is None
    assert ops._tiling_for(gy, xs, 1.0, True) == DEFAULT_TILING
    assert tuner.asked == 0
    tuner.capturing = False
    assert ops._tiling_for(gy, xs, 1.0, True) == TILINGS[1]


def test_where_there_is_no_memory_to_measure_in_it_is_tried_once(tuned):
    gy, xs = torch.empty(64, 48), torch.empty(64, 8)
    tuner = tuned(Tuned(fails=True))
    for _ in range(3):
        assert ops._tiling_for(gy, xs, 1.0, False) == DEFAULT_TILING
    assert tuner.asked == 1


def test_timing_takes_no_memory_beyond_what_the_candidates_take(gpu):
    gy = torch.randn(512, 1024, device=gpu).bfloat16()
    made = []
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert ops._milliseconds(lambda: made.append(gy.sum())) > 0
    assert len(made) == ops._CALLS + 1
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_without_memory_to_measure_in_half_the_batch_shows_what_is_fast(tuned):
    gy, xs = torch.empty(64, 48), torch.empty(64, 8)
    tuned(Tuned(fails=True, tokens_32=str(TILINGS[3])))
    assert ops._tiling_for(gy, xs, 1.0, False) == TILINGS[3]


def test_tf32_follows_either_of_torchs_settings():
    assert not takes_tf32()
    try:
        torch.set_float32_matmul_precision("high")
        assert takes_tf32()
        torch.set_float32_matmul_precision("highest")
        assert not takes_tf32()
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert takes_tf32()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_it_is_a_well_behaved_operator(device):
    gy = torch.randn(7, 5, device=device, requires_grad=True)
    xs = torch.randn(7, 3, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.paca.grad_columns, (gy, xs, 2.0, True))


def test_its_own_gradients_are_right(device):
    gy = torch.randn(7, 5, device=device, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(7, 3, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda gy, xs: torch.ops.paca.grad_columns(gy, xs, 2.0, True), (gy, xs))


def test_graph_capture_and_streams_leave_the_counters_at_zero(gpu):
    """The counters that tell the last program of a block are zero again after each launch, whoever launched."""
    gy, xs = torch.randn(4096, 512, device=gpu).bfloat16(), torch.randn(4096, 8, device=gpu).bfloat16()
    expected = tiled_grad_columns(gy, xs, 1.0, DEFAULT_TILING)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tiled_grad_columns(gy, xs, 1.0, DEFAULT_TILING)
    for _ in range(3):
        graph.replay()
    assert torch.equal(captured, expected)
    assert torch.equal(tiled_grad_columns(gy, xs, 1.0, DEFAULT_TILING), expected)
    assert all(not counters.any() for counters in ops._counters.values())


def test_a_graph_counts_with_what_was_made_before_its_capture(monkeypatch):
    """Zeros that are made in a capture are another launch in each replay."""
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    like, own = SimpleNamespace(is_cuda=True, device=torch.device("cpu")), torch.zeros(64, dtype=torch.int32)
    with ops.counting_with(own):
        assert ops._arrived(like, 64) is own
        assert len(ops._arrived(like, 65)) == 65
        stream.cuda_stream = 8  # a branch of the graph, which may run at the same time
        assert ops._arrived(like, 64) is not own
    stream.cuda_stream = 7
    assert ops._arrived(like, 64) is not own


def test_a_captured_model_launches_nothing_but_the_kernel(gpu):
    gy, xs = torch.randn(4096, 512, device=gpu).bfloat16(), torch.randn(4096, 8, device=gpu).bfloat16()
    expected = tiled_grad_columns(gy, xs, 1.0, DEFAULT_TILING)
    (captured,), replay = record_cuda_graph(lambda: [tiled_grad_columns(gy, xs, 1.0, DEFAULT_TILING)])
    for _ in range(3):
        assert torch.equal(replay()[0], expected)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        replay()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels == ["grad_columns_kernel"]
    assert torch.equal(captured, expected)
