"""Trains each option of docs/family.md on the quick start's model and text, beside LoRA with as many parameters.

    python benchmarks/family.py                          every option, three seeds: hours on a laptop's CPU
    python benchmarks/family.py --only prefix,lora --seeds 0
    python benchmarks/family.py --report                 write the table of docs/family.md again from the raw result

Runs that the raw result has already are not repeated. Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULT, PAGE = Path("benchmarks/family/quickstart.json"), Path("docs/family.md")
_BLOCK = re.compile(r"<!-- family -->.*?<!-- end -->", re.DOTALL)
RECIPE = "recipes/quickstart.yaml"
# With these every option trains as many parameters as PaCA with r = 8, but for heads that do not divide evenly.
OPTIONS: dict[str, dict[str, Any]] = {
    "paca": {},
    "s2ft": {"selection": "s2ft", "target_modules": ["o_proj", "down_proj"], "r": 36, "paca_alpha": 36},
    "s2ft-copermuted": {
        "selection": "s2ft", "copermute": True, "target_modules": ["o_proj", "down_proj"], "r": 36, "paca_alpha": 36,
    },
    "prefix": {"prefix_training": {"min": 1, "max": 8}},
    "groups": {"groups": 4},
    "reselect": {"reselect": 10},
    "largest_change": {"selection": "largest_change"},
    "group_lasso": {"group_lasso": 0.5},
    "mask-random": {"selection": "mask_random"},
    "mask-magnitude": {"selection": "mask_magnitude"},
    "mask-gradient": {"selection": "mask_gradient"},
    "mask-snip": {"selection": "mask_snip"},
    "lora": {},
}  # fmt: skip


def train(name: str, seed: int, steps: int, scratch: str) -> dict[str, Any]:
    """Train one option in this process and return what is recorded of it."""
    import torch

    from paca import training
    from paca.recipe import Given, read_file, resolve

    torch.set_num_threads(1)

    def recipe(**keys: Any) -> Any:
        given = read_file(Path(RECIPE)) | {key: Given(value, name) for key, value in keys.items()}
        return resolve(given)

    shared = {"seed": seed, "random_seed": seed, "max_steps": steps, "save_strategy": "no", "prompts": []}
    shared |= {"evaluate_before": False, "disable_tqdm": True}
    keys = dict(OPTIONS[name])
    if name == "largest_change":
        warmup = recipe(**shared, r=32, paca_alpha=32, output_dir=f"{scratch}/warmup").with_training(
            max_steps=steps // 4
        )
        training.train(warmup, say=lambda line: None)
        keys["warmup_adapter"] = f"{scratch}/warmup"
    run = recipe(**shared, **keys, output_dir=f"{scratch}/run")
    counts: dict[str, Any] = {}
    make = training.adapted_model
    training.adapted_model = (lambda *given: _lora(*given)) if name == "lora" else make  # type: ignore[assignment]

    class Clock(training.trainer_class()):  # type: ignore[misc]
        """Takes the processor time of each step, and counts what trains."""

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            counts.setdefault("trained", sum(p.numel() for p in model.parameters() if p.requires_grad))
            counts.setdefault("marks", []).append(time.process_time())
            return super().training_step(model, *args, **kwargs)

    training.trainer_class = lambda: Clock
    metrics = training.train(run, say=lambda line: None)
    marks = counts["marks"]
    return {
        "eval_loss": metrics["eval_loss"],
        "trained": counts["trained"],
        "file_bytes": (Path(scratch) / "run" / "adapter_model.safetensors").stat().st_size,
        "step_cpu_seconds": statistics.median(b - a for a, b in pairwise(marks[1:])),
    }


def _lora(recipe: Any, config: Any, data: Any, tokenizer: Any, length: int, say: Any) -> Any:
    """The base model with PEFT's LoRA of as many parameters as PaCA with the recipe's rank."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from paca.training import base_model

    model = base_model(recipe, config, data.classes, tokenizer)
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    wanted = recipe.adapter["r"] * sum(m.out_features for m in linears)
    rank = round(wanted / sum(m.in_features + m.out_features for m in linears))
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def measure(names: list[str], seeds: list[int], steps: int) -> None:
    """Run what is missing, each in a child, and keep the raw result after every run."""
    from paca.bench.machine import describe
    from paca.registry import get_backend

    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"steps": steps, "recipe": RECIPE, "runs": {}}
    if result["steps"] != steps:
        raise SystemExit(f"{RESULT} has runs of {result['steps']} steps; remove it to measure {steps}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name in names:
            if str(seed) in result["runs"].setdefault(name, {}):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                command = [sys.executable, __file__, "--child", name, str(seed), str(steps), scratch]
                environment = {
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                }
                subprocess.run(command, check=True, env=environment)
                result["runs"][name][str(seed)] = json.loads((Path(scratch) / "result.json").read_text())
            result["machine"] = describe(get_backend())
            part = RESULT.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(part, RESULT)
            print(f"{name}, seed {seed}: {result['runs'][name][str(seed)]}", flush=True)


def table(result: dict[str, Any]) -> str:
    """Return the table for the page."""
    lora = result["runs"].get("lora", {})
    lines = [
        "| option | held-out loss, mean (least to most) | trained parameters | file MB | step time / LoRA's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, runs in result["runs"].items():
        losses = [run["eval_loss"] for run in runs.values()]
        ratios = [
            run["step_cpu_seconds"] / lora[seed]["step_cpu_seconds"] for seed, run in runs.items() if seed in lora
        ]
        some = next(iter(runs.values()))
        lines.append(
            f"| {name} | {statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}) | "
            f"{some['trained']:,} | "
            f"{some['file_bytes'] / 1e6:.2f} | {f'{statistics.median(ratios):.2f}' if ratios else '-'} |"
        )
    seeds = max(len(runs) for runs in result["runs"].values())
    machine = result["machine"]
    lines += ["", f"{result['steps']} steps of {result['recipe']} with one learning rate for all; seeds: {seeds}; "]
    lines[-1] += "processor time of one thread; "
    lines[-1] += f"{machine['processor']}, commit {machine['revision']}, {machine['date']}."
    return "\n".join(lines)


def filled(page: str, result: dict[str, Any]) -> str:
    """Return the page with the table of a raw result."""
    return _BLOCK.sub(lambda _: f"<!-- family -->\n\n{table(result)}\n\n<!-- end -->", page)


def main() -> None:
    """Measure, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(OPTIONS), metavar="A,B,…", help=f"of {', '.join(OPTIONS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, seed, steps, scratch = given.child
        made = train(name, int(seed), int(steps), scratch)
        (Path(scratch) / "result.json").write_text(json.dumps(made))
        return
    names = given.only.split(",")
    if unknown := [name for name in names if name not in OPTIONS]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(OPTIONS)}")
    if not given.report:
        measure(names, given.seeds, given.steps)
    part = PAGE.with_suffix(".part")
    part.write_text(filled(PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text())), encoding="utf-8")
    os.replace(part, PAGE)


if __name__ == "__main__":
    main()
