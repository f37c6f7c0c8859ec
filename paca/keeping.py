"""Keeps tensors for a backward before the product of its forward is made, so that recomputation can leave that out.

Recomputation (`torch.utils.checkpoint`, use_reentrant=False) ends as soon as the last tensor that a backward needs is
there again. `save_for_backward` tells of a tensor only after forward has returned, so the last linear layer of each
block would be multiplied again, for nothing: a frozen model leaves it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What is asked to keep tensors at this moment, as two functions, or None; not in old versions of torch.
_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for backward as `ctx.save_for_backward` does, but at once; to be called before the product."""
    hooks = None if torch.compiler.is_compiling() else _hooks(False)
    if hooks is None:
        ctx.unpack = None
        ctx.save_for_backward(*tensors)
        return
    pack, ctx.unpack = hooks
    # What was computed knows the graph that it came from, and would hold it.
    ctx.packed = [None if t is None else pack(t.detach() if t.requires_grad else t) for t in tensors]


def kept(ctx: Any) -> tuple[Any, ...]:
    """Return what `keep` was given."""
    if ctx.unpack is None:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    return tuple(None if packed is None else ctx.unpack(packed) for packed in ctx.packed)
