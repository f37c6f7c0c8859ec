"""What gathering channels should cost on a Gaudi2, from published rates; nothing here was measured.

    python -m paca_hpu        writes the tables of docs/gaudi.md to standard output

Both ways move or multiply a number of bytes or products that is proportional to the tokens T, so the faster one depends
on the layer alone:

    index_select   T · touched · 256 B · 2.4 / bandwidth, where touched = n (1 − (1 − 1/n)^r) of the n = in·size/256
                   blocks of a row are expected to hold one of r random channels
    one-hot GEMM   the larger of T · in · size / bandwidth (reading x) and 2 · T · in · max(r, 256) / MME rate
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

MME_FLOPS = 432e12  # bfloat16; Intel Gaudi 2 and 3 product briefs
BANDWIDTH = 2.46e12  # bytes a second, HBM2E; the same
BLOCK = 256  # bytes that one access to memory brings; arXiv 2501.00210, section 4
# Gathers of less than a block reach so much less of the bandwidth (same paper, against a GPU of the same bandwidth).
SMALL_ACCESS_LOSS = 2.4
MME_WIDTH = 256  # outputs that the matrix engine computes side by side: fewer cost as much


@dataclass(frozen=True)
class Linear:
    """A linear layer of a model: `count` of them read the same input."""

    name: str
    n_in: int
    n_out: int


# meta-llama/Meta-Llama-3-8B, config.json: hidden 4096, 8 of 32 heads for keys and values, intermediate 14336.
LLAMA_3_8B = (
    Linear("q_proj", 4096, 4096),
    Linear("k_proj", 4096, 1024),
    Linear("v_proj", 4096, 1024),
    Linear("o_proj", 4096, 4096),
    Linear("gate_proj", 4096, 14336),
    Linear("up_proj", 4096, 14336),
    Linear("down_proj", 14336, 4096),
)
# Layers that read the same tensor at the same columns share one gather.
SHARED = ("q_proj", "o_proj", "gate_proj", "down_proj")


def index_select_seconds(tokens: int, n_in: int, r: int, size: int = 2) -> float:
    """Time to pick r of n_in channels of `size` bytes one by one on the vector cores."""
    blocks = max(1, ceil(n_in * size / BLOCK))
    touched = blocks * (1.0 - (1.0 - 1.0 / blocks) ** r)
    return float(tokens * touched * BLOCK * SMALL_ACCESS_LOSS / BANDWIDTH)


def one_hot_seconds(tokens: int, n_in: int, r: int, size: int = 2) -> float:
    """Time to pick r of n_in channels of `size` bytes by a product on the matrix engine."""
    reading = tokens * n_in * size / BANDWIDTH
    return max(reading, gemm_seconds(tokens, n_in, max(r, MME_WIDTH), size))


def gemm_seconds(tokens: int, n_in: int, n_out: int, size: int = 2) -> float:
    """Time of a product (tokens, n_in) · (n_in, n_out); a dtype twice as wide takes twice as long."""
    return 2.0 * tokens * n_in * n_out * (size / 2) / MME_FLOPS


def one_hot_is_cheaper(n_in: int, r: int, size: int = 2) -> bool:
    """Whether the one-hot product should beat `index_select`, whatever the number of tokens."""
    return one_hot_seconds(1, n_in, r, size) < index_select_seconds(1, n_in, r, size)


def frozen_seconds(tokens: int) -> float:
    """Time of the GEMMs of one frozen Llama-3-8B layer: forward and the gradient of the input."""
    return sum(2 * gemm_seconds(tokens, layer.n_in, layer.n_out) for layer in LLAMA_3_8B)


def extra_seconds(tokens: int, r: int) -> dict[str, float]:
    """Time that PaCA adds to one frozen Llama-3-8B layer in bfloat16, by its three parts."""
    shared = [layer for layer in LLAMA_3_8B if layer.name in SHARED]
    gathers = sum(
        min(index_select_seconds(tokens, layer.n_in, r), one_hot_seconds(tokens, layer.n_in, r)) for layer in shared
    )
    products = sum(
        max(gemm_seconds(tokens, layer.n_out, max(r, MME_WIDTH)), 2 * tokens * layer.n_out / BANDWIDTH)
        for layer in LLAMA_3_8B
    )
    # A column of a row-major weight is one small access a row, read and written; once a step, here a step of one batch.
    writes = sum(2 * index_select_seconds(layer.n_out, layer.n_in, r) for layer in LLAMA_3_8B)
    return {"gather": gathers, "gradient of the columns": products, "write": writes}


def gather_table(tokens: int = 4096) -> list[str]:
    """The Markdown table of both ways for the inputs of a Llama-3-8B layer."""
    lines = [
        "| input of | channels | r | index_select, µs | one-hot GEMM, µs | `auto` takes |",
        "|---|---|---|---|---|---|",
    ]
    for name, n_in in (("q/k/v, o, gate/up", 4096), ("down", 14336)):
        for r in (8, 16, 32, 64, 128):
            one_by_one = 1e6 * index_select_seconds(tokens, n_in, r)
            product = 1e6 * one_hot_seconds(tokens, n_in, r)
            chosen = "one_hot" if one_hot_is_cheaper(n_in, r) else "index_select"
            lines.append(f"| {name} | {n_in} | {r} | {one_by_one:.1f} | {product:.1f} | {chosen} |")
    return lines


def overhead_table(tokens: int = 4096) -> list[str]:
    """The Markdown table of what PaCA should add to the GEMMs of a frozen Llama-3-8B layer."""
    floor = frozen_seconds(tokens)
    lines = [
        "| r | gathers, µs | dYᵀ Xs, µs | write, µs | sum | share of the frozen GEMMs |",
        "|---|---|---|---|---|---|",
    ]
    for r in (8, 16, 32, 64, 128):
        parts = extra_seconds(tokens, r)
        total = sum(parts.values())
        cells = " | ".join(f"{1e6 * part:.0f}" for part in parts.values())
        lines.append(f"| {r} | {cells} | {1e6 * total:.0f} | {100 * total / floor:.1f} % |")
    return lines
