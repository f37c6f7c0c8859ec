"""Prints a prediction as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paca.estimate.fit import MOST_SEQUENCES
from paca.estimate.step import KINDS

_HEADS = {"columns": "columns", "adapter": "adapters", "kept": "kept", "dequantised": "dequant.", "temporary": "other"}

_LATER = "Gradients, as large as the adapters, are made after that."


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines that `paca estimate` prints of what it writes as JSON."""
    work, methods = result["work"], result["methods"]
    how = "with" if work["checkpointing"] else "without"
    yield (
        f"{result['model']}: {result['parameters'] / 1e9:.2f} billion parameters, {result['dtype']}; r={result['r']}; "
        f"{work['sequences']} x {work['length']} tokens, {how} gradient checkpointing"
    )
    yield "GiB in use when most is, predicted from shapes and not measured:"
    yield ""
    kinds = [kind for kind in KINDS if any(told["bytes_at_peak"].get(kind) for told in methods.values())]
    wide = max(len(told["label"]) for told in methods.values())
    yield " " * wide + f"{'peak':>9}  " + "".join(f"{_HEADS.get(kind, kind):>10}" for kind in kinds)
    for told in methods.values():
        parts = "".join(f"{told['bytes_at_peak'].get(kind, 0) / 2**30:10.2f}" for kind in kinds)
        yield f"{told['label']:<{wide}}{told['peak_bytes'] / 2**30:9.2f}  {parts}"
    if "gradients" not in kinds:
        yield ""
        yield _LATER
    cards = list(next(iter(methods.values()))["fits"])
    if not cards:
        return
    assumed = result["assumed"]
    yield ""
    yield (
        f"What fits, if the allocator loses {assumed['allocator_share']:.0%} and context and libraries take "
        f"{assumed['context_bytes'] / 2**30:.0f} GiB (assumed). longest: tokens of a sequence at batch "
        f"{work['sequences']}; batch: sequences of {work['length']} tokens."
    )
    for card in cards:
        yield ""
        yield f"{card:<{wide}}{'without checkpointing':>28}{'with checkpointing':>30}"
        yield " " * wide + f"{'fits':>8}{'longest':>10}{'batch':>10}" + f"{'fits':>10}{'longest':>10}{'batch':>10}"
        for told in methods.values():
            plain, checkpointed = (_cells(told["fits"][card][key]) for key in ("plain", "checkpointed"))
            yield f"{told['label']:<{wide}}{plain}  {checkpointed}"


def _cells(told: Mapping[str, Any]) -> str:
    longest, batch = told["longest_sequence"] or "-", told["largest_batch"] or "-"
    most = f"{batch}+" if batch == MOST_SEQUENCES else batch
    return f"{'yes' if told['fits'] else 'no':>8}{longest:>10}{most:>10}"
