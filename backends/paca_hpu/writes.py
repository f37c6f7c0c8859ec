"""How columns are written on Gaudi: a further way, because the vendor skips its own tests of `index_copy_`, and when.

All ways write in place, at a fixed address (an HPU graph holds it), with shapes that are always the same. They run
after the optimizer's step, outside compiled code: a compiled HPU graph may drop a write to a tensor that it shares
(vllm-gaudi, models/qwen3_5.py). The axis is 1 and never -1, which the bridge hands to its kernel unwrapped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from paca.strategies import ColumnWrite


def write_scatter(writes: Sequence[ColumnWrite]) -> None:
    """Write columns with `scatter_`, one call a weight."""
    for write in writes:
        values = write.values()
        write.weight.scatter_(1, write.index.unsqueeze(0).expand_as(values), values)


def write_what_is_due(module: nn.Module) -> None:
    """Write the columns of all layers that changed: a write in the next forward would become part of its graph."""
    for part in module.modules():
        write = getattr(part, "write_again", None)
        if callable(write):
            write()
