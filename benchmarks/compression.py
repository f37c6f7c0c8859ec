"""Measures what `paca compress` costs on the quick start's model and text, and writes the table of docs/adapters.md.

python benchmarks/compression.py                 train one adapter (seed 0), compress and evaluate it
python benchmarks/compression.py --report        write the table again from the raw result
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from family import RECIPE, train, with_block

from paca.whole import write_text

RESULT, PAGE = Path("benchmarks/family/compression.json"), Path("docs/adapters.md")


def measure(seed: int, steps: int) -> dict[str, Any]:
    """Train the quick start's adapter, and evaluate the base model, the adapter and its compressed copies."""
    import torch

    from paca.bench.machine import describe
    from paca.compress import BITS
    from paca.compressing import compress
    from paca.registry import get_backend
    from paca.training import evaluate, of_adapter

    torch.set_num_threads(1)
    result: dict[str, Any] = {"recipe": RECIPE, "steps": steps, "seed": seed, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        train("paca", seed, steps, scratch)
        adapter = Path(scratch) / "run"
        recipe = of_adapter(adapter, {})

        def loss(folder: Path | None) -> float:
            value: float = evaluate(recipe, folder, say=lambda line: None)["eval_loss"]
            return value

        size = (adapter / "adapter_model.safetensors").stat().st_size
        result["base_loss"] = loss(None)
        result["rows"].append({"bits": 32, "bytes": size, "error": 0.0, "eval_loss": loss(adapter)})
        for bits in BITS:
            report = compress(adapter, Path(scratch) / str(bits), bits)
            row = {"bits": bits, "bytes": report.after, "error": report.total}
            result["rows"].append(row | {"eval_loss": loss(Path(scratch) / str(bits))})
            print(result["rows"][-1], flush=True)
    return result | {"machine": describe(get_backend())}


def table(result: dict[str, Any]) -> str:
    """Return the table for the page."""
    whole = result["rows"][0]
    gained = result["base_loss"] - whole["eval_loss"]
    lines = [
        "| bits of a delta | file MB | times smaller | relative error of the update | held-out loss | gain kept |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        kept = (result["base_loss"] - row["eval_loss"]) / gained
        lines.append(
            f"| {row['bits']} | {row['bytes'] / 1e6:.2f} | {whole['bytes'] / row['bytes']:.1f} | {row['error']:.4f} | "
            f"{row['eval_loss']:.4f} | {100 * kept:.1f} % |"
        )
    machine = result["machine"]
    lines += [
        "",
        f"The base model's loss is {result['base_loss']:.4f}. {result['steps']} steps of {result['recipe']}, seed "
        f"{result['seed']}; commit {machine['revision']}, {machine['date']}.",
    ]
    return "\n".join(lines)


def filled(page: str, result: dict[str, Any]) -> str:
    """Return the page with the table of the raw result."""
    return with_block(page, "compression", table(result))


def main() -> None:
    """Measure, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--report", action="store_true", help="only write the table")
    given = parser.parse_args()
    if not given.report:
        write_text(RESULT, json.dumps(measure(given.seed, given.steps), indent=1))
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
