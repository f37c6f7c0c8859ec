"""Trains each option of docs/family.md on the quick start's model and text, beside LoRA with as many parameters.

    python benchmarks/family.py                          every option, three seeds: hours on a laptop's CPU
    python benchmarks/family.py --only prefix,lora --seeds 0
    python benchmarks/family.py --time                   a step of each option and of LoRA in turn, in minutes
    python benchmarks/family.py --report                 write the table of docs/family.md again from the raw results

Runs that the raw result has already are not repeated. Every run is a process of its own. Losses do not depend on how
busy the machine is; times do, and have a result of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from paca.whole import write_text

RESULT, STEPS = Path("benchmarks/family/quickstart.json"), Path("benchmarks/family/steps.json")
PAGE = Path("docs/family.md")
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


def recipe_of(name: str, **keys: Any) -> Any:
    """Return the quick start's recipe with other keys."""
    from paca.recipe import Given, read_file, resolve

    return resolve(read_file(Path(RECIPE)) | {key: Given(value, name) for key, value in keys.items()})


def train(name: str, seed: int, steps: int, scratch: str) -> dict[str, Any]:
    """Train one option in this process and return what is recorded of it."""
    import torch

    from paca import training

    torch.set_num_threads(1)
    shared = {"seed": seed, "random_seed": seed, "max_steps": steps, "save_strategy": "no", "prompts": []}
    shared |= {"evaluate_before": False, "disable_tqdm": True}
    keys = dict(OPTIONS[name])
    if name == "largest_change":
        wide = {"r": 32, "paca_alpha": 32, "output_dir": f"{scratch}/warmup"}
        warmup = recipe_of(name, **shared, **wide).with_training(max_steps=steps // 4)
        training.train(warmup, say=lambda line: None)
        keys["warmup_adapter"] = f"{scratch}/warmup"
    run = recipe_of(name, **shared, **keys, output_dir=f"{scratch}/run")
    counts: dict[str, Any] = {}
    make = training.adapted_model
    training.adapted_model = adapted_with_lora if name == "lora" else make  # type: ignore[assignment]

    class Counting(training.trainer_class()):  # type: ignore[misc]
        """Counts what trains."""

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            counts.setdefault("trained", sum(p.numel() for p in model.parameters() if p.requires_grad))
            return super().training_step(model, *args, **kwargs)

    training.trainer_class = lambda: Counting
    metrics = training.train(run, say=lambda line: None)
    return {
        "eval_loss": metrics["eval_loss"],
        "trained": counts["trained"],
        "file_bytes": (Path(scratch) / "run" / "adapter_model.safetensors").stat().st_size,
    }


def wide_warmup(folder: Path) -> str:
    """Save an adapter of random values that `largest_change` can choose from, and return where."""
    import torch
    from peft import get_peft_model

    from paca import training
    from paca.layer import PacaLayer
    from paca.pretrained import load_config, load_tokenizer

    recipe = recipe_of("warmup", r=32, paca_alpha=32, output_dir=str(folder))
    config, tokenizer = load_config(recipe.run), load_tokenizer(recipe.run)
    model = get_peft_model(training.base_model(recipe, config, (), tokenizer), training.adapter_config(recipe))
    for layer in model.modules():
        if isinstance(layer, PacaLayer):
            torch.nn.init.normal_(layer.paca_delta["default"])
    model.save_pretrained(folder)
    return str(folder)


def adapted_with_lora(recipe: Any, config: Any, data: Any, tokenizer: Any, length: int, say: Any) -> Any:
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
                made = json.loads((Path(scratch) / "result.json").read_text())
            result["machine"] = describe(get_backend())
            result["runs"][name][str(seed)] = made | {"revision": result["machine"]["revision"]}
            write_text(RESULT, json.dumps(result, indent=1))
            print(f"{name}, seed {seed}: {result['runs'][name][str(seed)]}", flush=True)


def time_steps(names: list[str], rounds: int) -> None:
    """Time the options' steps and write the raw result."""
    sys.path.insert(0, str(Path(__file__).parent))
    import family_steps

    from paca.bench.machine import describe
    from paca.registry import get_backend

    with tempfile.TemporaryDirectory() as scratch:
        result = family_steps.measure(names, rounds, Path(scratch))
    result["machine"] = describe(get_backend())
    STEPS.parent.mkdir(parents=True, exist_ok=True)
    write_text(STEPS, json.dumps(result, indent=1))


def ratios(steps: dict[str, Any]) -> dict[str, float]:
    """Return each option's step time divided by LoRA's of the same round, the median over rounds."""
    return {
        name: statistics.median(a / b for a, b in zip(seconds, group["lora"], strict=True))
        for group in steps.get("groups", [])
        for name, seconds in group.items()
    }


def table(result: dict[str, Any], steps: dict[str, Any]) -> str:
    """Return the table for the page, of the losses and of the times."""
    slower = ratios(steps)
    lines = [
        "| option | held-out loss, mean (least to most) | seeds | trained parameters | file MB | step time / LoRA's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, runs in result["runs"].items():
        losses = [run["eval_loss"] for run in runs.values()]
        some = next(iter(runs.values()))
        lines.append(
            f"| {name} | {statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}) | {len(runs)} | "
            f"{some['trained']:,} | "
            f"{some['file_bytes'] / 1e6:.2f} | {f'{slower[name]:.2f}' if name in slower else 'not measured'} |"
        )
    lines += ["", f"Losses: {result['steps']} steps of {result['recipe']} with one learning rate for all; "]
    lines[-1] += _made_on(
        result["machine"], {run["revision"] for runs in result["runs"].values() for run in runs.values()}
    )
    if steps:
        lines += [
            "",
            f"Times: processor time of one thread, {steps['tokens']} tokens a step, options and LoRA in turn, ",
        ]
        lines[-1] += f"median over {steps['rounds']} rounds of the ratio; "
        lines[-1] += _made_on(steps["machine"], {steps["machine"]["revision"]})
    return "\n".join(lines)


def _made_on(machine: dict[str, Any], revisions: set[str]) -> str:
    return f"{machine['processor']}, commit {' and '.join(sorted(revisions))}, {machine['date']}."


def filled(page: str, result: dict[str, Any], steps: dict[str, Any]) -> str:
    """Return the page with the table of the raw results."""
    return with_block(page, "family", table(result, steps))


def with_block(page: str, name: str, text: str) -> str:
    """Return the page with `text` between `<!-- name -->` and `<!-- end -->`.

    Raises:
        ValueError: if the page has no such block.
    """
    before, start, rest = page.partition(f"<!-- {name} -->")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError(f"the page has no block <!-- {name} --> … <!-- end -->")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def read_steps() -> dict[str, Any]:
    """Return the raw result of the times, empty if there is none."""
    found: dict[str, Any] = json.loads(STEPS.read_text()) if STEPS.exists() else {}
    return found


def main() -> None:
    """Measure, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(OPTIONS), metavar="A,B,…", help=f"of {', '.join(OPTIONS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--time", action="store_true", help="time steps instead of training")
    parser.add_argument("--rounds", type=int, default=3, help="of --time")
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
    if given.time:
        time_steps(names, given.rounds)
    elif not given.report:
        measure(names, given.seeds, given.steps)
    if not RESULT.exists():
        return
    page = filled(PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text()), read_steps())
    write_text(PAGE, page)


if __name__ == "__main__":
    main()
