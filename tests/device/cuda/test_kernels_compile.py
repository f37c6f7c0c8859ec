"""Every kernel compiles for the GPUs it is meant for; that needs Triton, but no GPU."""

from __future__ import annotations

import os
import re

import pytest

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", reason="Triton is not installed: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 nothing is compiled; the other stage does it", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from paca_cuda import kernels  # noqa: E402


def compiled(kernel, capability, types, constants, aligned=(), **options):
    """Compile as a launch with these arguments would."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "r"), [("bf16", 8), ("bf16", 64), ("fp32", 8)])
def test_grad_columns_reads_sixteen_bytes_at_a_time_while_it_computes(capability, dtype, r):
    if dtype == "fp32" and capability != 80:
        pytest.skip("float32 is compiled for one device; the code is the same")
    from paca_cuda.ops import DEFAULT_TILING

    made = compiled(
        kernels.grad_columns_kernel,
        capability,
        {
            **{"gy": f"*{dtype}", "xs": f"*{dtype}", "grad": "*fp32", "partial": "*fp32", "arrived": "*i32"},
            **{"scale": "fp32", "tokens": "i32", "n_out": "i32", "gy_token_stride": "i32"},
        },
        {
            **{"gy_out_stride": 1, "xs_channel_stride": 1, "r": r, "xs_token_stride": r, "R": max(16, r)},
            **{"BLOCK_OUT": DEFAULT_TILING.out, "BLOCK_TOKENS": DEFAULT_TILING.tokens, "SPLIT": 4},
            **{"PRECISION": "ieee", "WIDEN": False},
        },
        aligned=("gy", "xs", "grad", "partial", "arrived", "tokens", "n_out", "gy_token_stride"),
        num_warps=DEFAULT_TILING.warps,
        num_stages=DEFAULT_TILING.stages,
    )
    ptx = made.asm["ptx"]
    assert made.asm["cubin"]
    assert "cp.async" in ptx  # the next block is on its way while this one is multiplied
    assert not re.search(r"cp\.async\.c[ag]\.shared\.global [^;]*0x[48]\b", ptx)
    assert not re.search(r"ld\.global(\.cg)?\.b16", ptx)
    assert not re.search(r"(ld|st)\.local", ptx)  # no register is spilled
    if dtype == "bf16":
        assert re.search({80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma|mma.sync"}[capability], ptx)
    assert "atom.global.gpu.acq_rel" in ptx


@pytest.mark.parametrize("one", ["n_out", "tokens", "gy_token_stride", "r"])
def test_grad_columns_compiles_for_a_size_of_one(one):
    """Triton makes a constant of an argument that is 1: of the width of a regression head, for example."""
    types = {
        **{"gy": "*bf16", "xs": "*bf16", "grad": "*fp32", "partial": "*fp32", "arrived": "*i32"},
        **{"scale": "fp32", "tokens": "i32", "n_out": "i32", "gy_token_stride": "i32"},
    }
    constants = {
        **{"gy_out_stride": 1, "xs_channel_stride": 1, "r": 8, "xs_token_stride": 8, "R": 16},
        **{"BLOCK_OUT": 64, "BLOCK_TOKENS": 32, "SPLIT": 4, "PRECISION": "ieee", "WIDEN": False, one: 1},
    }
    assert compiled(kernels.grad_columns_kernel, 90, types, constants, num_warps=4, num_stages=2).asm["cubin"]


@pytest.mark.parametrize("one", ["tokens", "r", "x_token_stride"])
def test_gather_compiles_for_a_size_of_one(one):
    types = {"x": "*bf16", "index": "*i64", "out": "*bf16", "tokens": "i32", "r": "i32", "x_token_stride": "i32"}
    constants = {"x_channel_stride": 1, "BLOCK_TOKENS": 128, "BLOCK_CHANNELS": 8, one: 1}
    assert compiled(kernels.gather_kernel, 90, types, constants).asm["cubin"]


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
def test_the_largest_rank_fits_the_smallest_shared_memory(dtype, size):
    from paca_cuda.ops import LARGEST_RANK, SHARED_BYTES, safe_tiling

    tiling = safe_tiling(LARGEST_RANK, size)
    made = compiled(
        kernels.grad_columns_kernel,
        86,
        {
            **{"gy": f"*{dtype}", "xs": f"*{dtype}", "grad": "*fp32", "partial": "*fp32", "arrived": "*i32"},
            **{"scale": "fp32", "tokens": "i32", "n_out": "i32", "gy_token_stride": "i32"},
        },
        {
            **{"gy_out_stride": 1, "xs_channel_stride": 1, "r": 256, "xs_token_stride": 256, "R": 256},
            **{"BLOCK_OUT": tiling.out, "BLOCK_TOKENS": tiling.tokens, "SPLIT": 4},
            **{"PRECISION": "ieee", "WIDEN": False},
        },
        aligned=("gy", "xs", "grad", "partial", "arrived", "tokens", "n_out", "gy_token_stride"),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    assert made.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize("capability", [80, 90])
def test_gather_compiles(capability):
    assert compiled(
        kernels.gather_kernel,
        capability,
        {"x": "*bf16", "index": "*i64", "out": "*bf16", "tokens": "i32", "r": "i32", "x_token_stride": "i32"},
        {"x_channel_stride": 1, "BLOCK_TOKENS": 128, "BLOCK_CHANNELS": 8},
    ).asm["cubin"]


@pytest.mark.parametrize(("weight", "delta"), [("bfloat16", "float32"), ("float16", "float16"), ("float64", "float64")])
def test_write_columns_rounds_the_product_before_the_sum(weight, delta):
    tl = triton.language
    wide = tl.float64 if weight == "float64" else tl.float32
    ptx = compiled(
        kernels.write_columns_kernel,
        90,
        {"table": "*i64", "scales": "*fp64", "entries": "*i32", "rows": "*i64"},
        {
            **{"WEIGHT": getattr(tl, weight), "DELTA": getattr(tl, delta), "PRODUCT": wide, "SUM": wide},
            **{"BLOCK_OUT": 64, "BLOCK_CHANNELS": 8},
        },
        enable_fp_fusion=False,
    ).asm["ptx"]
    assert re.search(r"mul\S*\.f(32|64)", ptx)
    assert "fma" not in ptx
