"""The kernels as torch operators `paca::gather`, `paca::grad_columns` and `paca::write_columns`.

As operators they have fake versions and autograd rules, so that torch.compile takes them whole. They run on CUDA, and
on the CPU where Triton interprets its kernels (TRITON_INTERPRET=1), which is how they are tested without a GPU. Else
tensors on the CPU, of a model or of layers that are not moved to the device, take torch's own operations.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paca.strategies import ColumnWrite, write_index_copy
from paca_cuda.tuning import Tuner, bucket, names_of, power_of_two

LARGEST_RANK = 256  # of the Triton kernel; its sums stay in registers


def why_no_triton() -> str | None:
    """Say why Triton kernels cannot run, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton, in the version that belongs to this torch"
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_library = torch.library.Library("paca", "FRAGMENT")
_library.define("gather(Tensor x, Tensor index) -> Tensor")
_library.define("grad_columns(Tensor gy, Tensor xs, float scale, bool only_triton) -> Tensor")
_library.define(
    "write_columns(Tensor(a!)[] weights, Tensor[] indices, Tensor[] bases, Tensor[] deltas, float[] scales) -> ()"
)


def _implement(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator for tensors of both devices."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for device in ("CUDA", "CPU"):
            _library.impl(name, function, device)
        return function

    return register


def _takes_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda or interpreted()


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


# ---------------------------------------------------------------- gather


@_implement("gather")
def _gather(x: Tensor, index: Tensor) -> Tensor:
    if not _takes_kernels(x):
        return x.index_select(-1, index)
    from paca_cuda import kernels

    out = x.new_empty(*x.shape[:-1], len(index))
    if not out.numel():
        return out
    rows = x.reshape(-1, x.shape[-1])
    tokens, r = len(rows), len(index)
    channels = min(64, power_of_two(r))
    block = max(1, 1024 // channels)
    grid = (-(-tokens // block), -(-r // channels))
    with _on_device_of(x):
        kernels.gather_kernel[grid](
            rows, index, out, tokens, r, *rows.stride(), BLOCK_TOKENS=block, BLOCK_CHANNELS=channels
        )
    return out


def _gather_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], index.shape[0])


torch.library.register_fake("paca::gather", _gather_fake)


def _gather_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.index, ctx.shape = inputs[1], inputs[0].shape


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Add each picked channel's gradient to where it came from."""
    return grad.new_zeros(ctx.shape).index_add(-1, ctx.index, grad), None


torch.library.register_autograd("paca::gather", _gather_backward, setup_context=_gather_context)


# ---------------------------------------------------------------- grad_columns


@dataclass(frozen=True)
class Tiling:
    """How the kernel of `grad_columns` cuts its work.

    Attributes:
        out: outputs of a program.
        tokens: tokens it reads at a time.
        programs: how many to aim at; the tokens are split until there are as many.
        warps: of a program.
        stages: blocks of tokens on their way from memory.
    """

    out: int
    tokens: int
    programs: int
    warps: int
    stages: int

    def split(self, tokens: int, n_out: int) -> int:
        """Return over how many programs the tokens are split: a power of two, with a few blocks left for each."""
        blocks = -(-n_out // self.out)
        wanted = max(1, self.programs // blocks)
        possible = max(1, tokens // (4 * self.tokens))
        return 1 << (min(wanted, possible, 64).bit_length() - 1)

    def shared_bytes(self, r: int, element_size: int) -> int:
        """Return the shared memory that the blocks on their way take, at most."""
        return self.stages * self.tokens * (self.out + max(16, power_of_two(r))) * element_size


DEFAULT_TILING = Tiling(out=64, tokens=64, programs=512, warps=4, stages=3)
SMALL_TILING = Tiling(out=64, tokens=32, programs=512, warps=4, stages=2)
SHARED_BYTES = 99 * 1024  # of a program, on the supported devices that have least (8.6, 8.9)
TILINGS = (
    DEFAULT_TILING,
    Tiling(out=64, tokens=64, programs=256, warps=4, stages=4),
    Tiling(out=64, tokens=128, programs=512, warps=4, stages=3),
    Tiling(out=128, tokens=64, programs=256, warps=4, stages=4),
    Tiling(out=128, tokens=64, programs=512, warps=8, stages=3),
    Tiling(out=128, tokens=32, programs=512, warps=4, stages=5),
    Tiling(out=64, tokens=32, programs=1024, warps=4, stages=5),
)
CUBLAS = "cublas"
# A dY of so many numbers is read in a few microseconds. Launching a Triton kernel takes the host several times as long
# as calling cuBLAS does, and a device that is done that soon waits for the host; unless a graph launches.
LAUNCH_BOUND = 1 << 23


def safe_tiling(r: int, element_size: int) -> Tiling:
    """Return a tiling that every supported device can run."""
    return DEFAULT_TILING if DEFAULT_TILING.shared_bytes(r, element_size) <= SHARED_BYTES else SMALL_TILING


def mm_float32(gy: Tensor, xs: Tensor, scale: float) -> Tensor:
    """Return s·gyᵀ xs by one GEMM that reads its low-precision inputs as they are, and sums and writes float32.

    (tokens, out), (tokens, r) -> (out, r); float64 stays float64.
    """
    if gy.is_cuda and gy.dtype in (torch.bfloat16, torch.float16):
        xs = xs if xs.dtype == gy.dtype else xs.to(gy.dtype)
        total = torch.mm(gy.t(), xs, out_dtype=torch.float32)
    else:
        wide = torch.promote_types(gy.dtype, torch.float32)
        total = torch.mm(gy.t().to(wide), xs.to(wide))
    return total if scale == 1.0 else total.mul_(scale)


@_implement("grad_columns")
def grad_columns(gy: Tensor, xs: Tensor, scale: float, only_triton: bool) -> Tensor:
    """Return s·gyᵀ xs; (tokens, out), (tokens, r) -> (out, r), float32, or float64 of float64.

    Args:
        gy: dY.
        xs: the picked channels of X.
        scale: s.
        only_triton: leave cuBLAS out of the candidates.
    """
    tokens, n_out, r = len(gy), gy.shape[1], xs.shape[1]
    if not tokens or not n_out or not r:
        return gy.new_zeros(n_out, r, dtype=_grad_dtype(gy))
    if gy.dtype == torch.float64 or r > LARGEST_RANK or not _takes_kernels(gy) or why_no_triton():
        return mm_float32(gy, xs, scale)
    if xs.dtype != gy.dtype:
        xs = xs.to(gy.dtype)
    with _on_device_of(gy):
        tiling = _tiling_for(gy, xs, scale, only_triton)
        return mm_float32(gy, xs, scale) if tiling is None else tiled_grad_columns(gy, xs, scale, tiling)


def _tiling_for(gy: Tensor, xs: Tensor, scale: float, only_triton: bool) -> Tiling | None:
    """Return the tiling for this problem, or None for cuBLAS.

    The fastest on the device; the default one where nothing can be timed; cuBLAS where the host's time decides.
    """
    if not gy.is_cuda or torch.are_deterministic_algorithms_enabled():  # times differ from run to run
        return safe_tiling(xs.shape[1], gy.element_size())
    decided = _decided(gy.device.index)
    problem = Problem(gy.dtype, bucket(len(gy)), gy.shape[1], xs.shape[1], gy.is_contiguous(), only_triton)
    if problem in decided:  # a layer asks in every step, and finding the name of a problem takes longer than a launch
        tiling = decided[problem]
    else:
        tiling, lasting = _choose_tiling(gy, xs, scale, problem)
        if lasting:
            decided[problem] = tiling
    if tiling is None or only_triton or gy.numel() > LAUNCH_BOUND:
        return tiling
    # All that Triton compiles a kernel anew for. It is launched once, for nothing but to be there when a graph is
    # captured: a capture that loads a kernel is refused.
    launch = problem, len(gy), gy.stride(), xs.stride(), gy.data_ptr() % 16, xs.data_ptr() % 16
    loaded = launch in _loaded
    if torch.cuda.is_current_stream_capturing():
        return tiling if loaded else None
    if not loaded:
        tiled_grad_columns(gy, xs, scale, tiling)
        _loaded.add(launch)
    return None


_loaded: set[object] = set()


class Problem(NamedTuple):
    """What the fastest tiling depends on."""

    dtype: torch.dtype
    tokens: int  # at most
    n_out: int
    r: int
    contiguous: bool
    only_triton: bool

    def name(self, candidates: int) -> str:
        """Return what the choice is kept under."""
        return (
            f"grad_columns {str(self.dtype).removeprefix('torch.')} tokens≤{self.tokens} out={self.n_out} "
            f"r={self.r}{'' if self.contiguous else ' strided'} of {candidates}"
        )


def _choose_tiling(gy: Tensor, xs: Tensor, scale: float, problem: Problem) -> tuple[Tiling | None, bool]:
    """Return the fastest tiling, measured if that is not known, and whether to ask no more in this process."""
    safe = safe_tiling(problem.r, gy.element_size())
    tilings = names_of([*TILINGS, safe])
    ways: dict[str, Tiling | None] = tilings if problem.only_triton else {CUBLAS: None, **tilings}
    tuner = _tuner(gy.device.index)
    known = tuner.known(problem.name(len(ways)))
    if known in ways:
        return ways[known], True
    if torch.cuda.is_current_stream_capturing():
        return (safe if problem.only_triton else None), False

    def run(tiling: Tiling | None) -> Tensor:
        return mm_float32(gy, xs, scale) if tiling is None else tiled_grad_columns(gy, xs, scale, tiling)

    candidates = {name: lambda tiling=tiling: run(tiling) for name, tiling in ways.items()}
    try:
        return ways[tuner.choose(problem.name(len(ways)), candidates)], True
    except torch.OutOfMemoryError:
        # Asked again in each step it would run out in each, and every time the allocator gives back all that it holds.
        # A batch of half the size is the nearest that may have been measured.
        near = tuner.known(problem._replace(tokens=problem.tokens // 2).name(len(ways)))
        return ways.get(near or "", safe), True


@lru_cache
def _decided(device: int) -> dict[Problem, Tiling | None]:
    """Return what this process has decided for a device: a tiling, or None for cuBLAS."""
    return {}


@lru_cache
def _tuner(device: int) -> Tuner:
    import triton

    found = torch.cuda.get_device_properties(device)
    versions = f"torch-{torch.__version__}-triton-{triton.__version__}"
    return Tuner(f"{found.name}-sm{found.major}{found.minor}-{versions}", _milliseconds)


_CALLS = 20  # timed of each candidate
_CYCLES_AHEAD = 4_000_000  # about two milliseconds: the host queues all calls meanwhile


def _milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call on the device, the host's time for launching it left out.

    Takes no memory of its own, unlike `triton.testing.do_bench`, whose quarter of a gigabyte would be the highest use
    of a small model's first step. What it empties with that, the cache, holds dY in a backward, too.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_CALLS + 1)]
    run()
    torch.cuda._sleep(_CYCLES_AHEAD)
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in pairwise(marks)))


def tiled_grad_columns(gy: Tensor, xs: Tensor, scale: float, tiling: Tiling) -> Tensor:
    """Launch the Triton kernel once; (tokens, out), (tokens, r) -> (out, r) float32."""
    from paca_cuda import kernels

    tokens, n_out, r = len(gy), gy.shape[1], xs.shape[1]
    split = tiling.split(tokens, n_out)
    blocks = -(-n_out // tiling.out)
    grad = gy.new_empty(n_out, r, dtype=torch.float32)
    partial = grad if split == 1 else gy.new_empty(split, n_out, r, dtype=torch.float32)
    kernels.grad_columns_kernel[(blocks, split)](
        gy,
        xs,
        grad,
        partial,
        grad if split == 1 else _arrived(gy, blocks),
        scale,
        tokens,
        n_out,
        *gy.stride(),
        xs.stride(1),
        r,
        xs.stride(0),
        BLOCK_OUT=tiling.out,
        BLOCK_TOKENS=tiling.tokens,
        R=max(16, power_of_two(r)),
        SPLIT=split,
        PRECISION="tf32" if gy.dtype == torch.float32 and takes_tf32() else "ieee",
        WIDEN=interpreted(),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return grad


def takes_tf32() -> bool:
    """Whether float32 products may be rounded to TF32, as torch is set for cuBLAS.

    Read from the newer of torch's two settings, which follows the older one; asking the older one fails where a program
    uses the newer.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


_counters: dict[tuple[torch.device, int], Tensor] = {}
_captured: list[tuple[int, Tensor]] = []  # the stream of a capture that is going on, and its counters
BLOCKS_OF_A_GRAPH = 4096  # of 64 outputs: of a vocabulary of 262,144


def graph_counters() -> Tensor:
    """Return counters for the launches of one graph; to be made before its capture, and to live as long as it."""
    return torch.zeros(BLOCKS_OF_A_GRAPH, dtype=torch.int32, device="cuda")


@contextmanager
def counting_with(counters: Tensor) -> Iterator[None]:
    """Let what is captured in the block, on its stream, count with these instead of with zeros made in the graph.

    Those would be one more launch for each of the kernel's, in each replay.
    """
    _captured.append((torch.cuda.current_stream().cuda_stream, counters))
    try:
        yield
    finally:
        _captured.pop()


def _arrived(like: Tensor, blocks: int) -> Tensor:
    """Return a zero for each block of outputs, int32; the kernel leaves zeros behind.

    Each stream and each graph has its own, because kernels of two may run at the same time. A graph that somebody else
    captures gets fresh ones, which live in its own memory.
    """
    if not like.is_cuda:
        return torch.zeros(blocks, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        for stream, counters in _captured[-1:]:
            here = stream == torch.cuda.current_stream(like.device).cuda_stream and counters.device == like.device
            if here and blocks <= len(counters):
                return counters
        return torch.zeros(blocks, dtype=torch.int32, device=like.device)
    key = like.device, torch.cuda.current_stream(like.device).cuda_stream
    if key not in _counters or len(_counters[key]) < blocks:
        _counters[key] = torch.zeros(max(1024, power_of_two(blocks)), dtype=torch.int32, device=like.device)
    return _counters[key]


def _grad_dtype(gy: Tensor) -> torch.dtype:
    return torch.promote_types(gy.dtype, torch.float32)


def _grad_columns_fake(gy: Tensor, xs: Tensor, scale: float, only_triton: bool) -> Tensor:
    return gy.new_empty(gy.shape[1], xs.shape[1], dtype=_grad_dtype(gy))


torch.library.register_fake("paca::grad_columns", _grad_columns_fake)


def _grad_columns_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
    gy, xs, ctx.scale, _ = inputs
    ctx.save_for_backward(gy, xs)


def _grad_columns_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    """Of G = s·gyᵀ xs: d gy = s·xs dGᵀ, d xs = s·gy dG."""
    gy, xs = ctx.saved_tensors
    grad = ctx.scale * grad
    return (xs.to(grad.dtype) @ grad.t()).to(gy.dtype), (gy.to(grad.dtype) @ grad).to(xs.dtype), None, None


torch.library.register_autograd("paca::grad_columns", _grad_columns_backward, setup_context=_grad_columns_context)


# ---------------------------------------------------------------- write_columns


@dataclass(frozen=True)
class _Table:
    """What one launch of the write kernel reads, on the device; it is valid as long as the addresses are."""

    rows: Tensor  # (weights, FIELDS) int64
    scales: Tensor  # (weights,) float64
    entries: Tensor  # (programs,) int32
    firsts: Tensor  # (programs,) int64
    channels: int  # of a block


OUTPUTS_PER_PROGRAM = 64
_LARGEST_BLOCK = 32  # channels
_TABLES_KEPT = 16
_tables: OrderedDict[object, _Table] = OrderedDict()


@_implement("write_columns")
def _write_columns(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    scales: Sequence[float],
) -> None:
    """Write `weight[:, index] = base + scale·delta` for all weights, one launch a device and pair of dtypes."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for number, (weight, delta) in enumerate(zip(weights, deltas, strict=True)):
        if delta.numel():
            groups.setdefault((weight.device, weight.dtype, delta.dtype), []).append(number)
    for members in groups.values():
        writes = [(weights[n], indices[n], bases[n], deltas[n], scales[n]) for n in members]
        if _takes_kernels(weights[members[0]]):
            _launch_write(writes)
        else:
            write_index_copy([ColumnWrite(*write) for write in writes])


def _launch_write(writes: list[tuple[Tensor, Tensor, Tensor, Tensor, float]]) -> None:
    from paca_cuda import kernels

    weight, _, _, delta, _ = writes[0]
    table = _table(writes)
    product = torch.promote_types(delta.dtype, torch.float32)  # torch's own, then rounded to the delta's dtype
    with _on_device_of(weight):
        kernels.write_columns_kernel[(len(table.entries),)](
            table.rows,
            table.scales,
            table.entries,
            table.firsts,
            WEIGHT=kernels.dtype(weight.dtype),
            DELTA=kernels.dtype(delta.dtype),
            PRODUCT=kernels.dtype(product),
            SUM=kernels.dtype(torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)),
            BLOCK_OUT=OUTPUTS_PER_PROGRAM,
            BLOCK_CHANNELS=table.channels,
            enable_fp_fusion=False,
        )


def _table(writes: list[tuple[Tensor, Tensor, Tensor, Tensor, float]]) -> _Table:
    """Return the table for these writes, built once and found again by addresses, sizes, strides and scales."""
    rows = [
        (
            *(weight.data_ptr(), index.data_ptr(), base.data_ptr(), delta.data_ptr(), *base.shape),
            *(*weight.stride(), *base.stride(), *delta.stride()),
        )
        for weight, index, base, delta, _ in writes
    ]
    device = writes[0][0].device
    key = device, *rows, *(write[-1] for write in writes)
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    entries: list[int] = []
    firsts: list[int] = []
    for number, (_, _, base, _, _) in enumerate(writes):
        starts = range(0, len(base), OUTPUTS_PER_PROGRAM)
        entries += [number] * len(starts)
        firsts += starts
    made = _Table(
        rows=torch.tensor(rows, dtype=torch.int64).to(device),
        scales=torch.tensor([write[-1] for write in writes], dtype=torch.float64).to(device),
        entries=torch.tensor(entries, dtype=torch.int32).to(device),
        firsts=torch.tensor(firsts, dtype=torch.int64).to(device),
        channels=min(_LARGEST_BLOCK, power_of_two(max(base.shape[1] for _, _, base, _, _ in writes))),
    )
    _tables[key] = made
    if len(_tables) > _TABLES_KEPT:
        _tables.popitem(last=False)
    return made


def _write_columns_fake(*args: Any) -> None:
    return None


torch.library.register_fake("paca::write_columns", _write_columns_fake)
