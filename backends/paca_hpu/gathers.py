"""Gaudi's ways to pick `x[..., index]`; signatures and shapes as in `paca.strategies`.

Matrix products run on the matrix engine (MME), everything else on the vector cores (TPC), where `index_select` reads
single elements at random. All shapes are fixed by those of `x` and `index`; nothing is read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paca.strategies import gather_index_select
from paca_hpu.cost import one_hot_is_cheaper


def gather_one_hot(x: Tensor, index: Tensor) -> Tensor:
    """Pick channels by a product with a 0/1 matrix on the MME.

    Exact for finite `x`; 0·inf is nan, so an inf or nan spreads to all picked channels of its token. The matrix is made
    by a comparison: `torch.nn.functional.one_hot` reads the numbers back to the host to check them.
    """
    channels = torch.arange(x.shape[-1], device=index.device, dtype=index.dtype)
    pick = (channels.unsqueeze(1) == index).to(x.dtype)  # (in, r)
    return x @ pick


def gather_by_cost(x: Tensor, index: Tensor) -> Tensor:
    """Pick channels in the way that `paca_hpu.cost` expects to be faster for these sizes."""
    if one_hot_is_cheaper(x.shape[-1], index.shape[0], x.element_size()):
        return gather_one_hot(x, index)
    return gather_index_select(x, index)
