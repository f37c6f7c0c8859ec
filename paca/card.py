"""The model card that is saved beside an adapter: what it was made from and how, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from paca._version import __version__
from paca.pretrained import local_path
from paca.recipe import Recipe

_USE = """\
```python
import paca  # makes PEFT know PaCA
from peft import {auto}
{imports}
model = {auto}.from_pretrained("path/to/this/folder"{how})
```
"""
# What loads the base as it was while the adapter was trained, by `quantization`: an import and an argument.
_LOADED_AS = {
    "none": ("", ""),
    "nf4": (
        "from transformers import BitsAndBytesConfig\n",
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    ),
    "int8": ("from transformers import BitsAndBytesConfig\n", "BitsAndBytesConfig(load_in_8bit=True)"),
    "fp8": (
        "from torchao.quantization import Float8WeightOnlyConfig\nfrom transformers import TorchAoConfig\n",
        "TorchAoConfig(Float8WeightOnlyConfig())",
    ),
}


def model_card(recipe: Recipe, metrics: Mapping[str, Any], samples: list[dict[str, str]], trainable: str) -> str:
    """Write the card as Markdown with the metadata that the hub reads.

    Args:
        recipe: what was run.
        metrics: what `all_results.json` holds.
        samples: `prompt`, `before` and `after` of each sample.
        trainable: the line that PEFT prints about trained parameters.
    """
    run = recipe.run
    causal = run.task == "causal_lm"
    metadata: dict[str, Any] = {"library_name": "peft", "tags": ["paca", "peft"]}
    metadata["pipeline_tag"] = "text-generation" if causal else "text-classification"
    if not local_path(run.model_name_or_path).exists():
        metadata["base_model"] = run.model_name_or_path
    data = run.dataset_name or run.train_file
    lines = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        f"# PaCA adapter for {run.model_name_or_path}\n",
        f"Made by [Partial Connection Adaptation](https://arxiv.org/abs/2503.01905) on `{data}`, paca {__version__}.",
        f"{trainable}.\n",
    ]
    if rows := before_and_after(metrics):
        lines += ["| held out | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {before} | {after} |" for name, before, after in rows]
        lines.append("")
    for sample in samples:
        lines += [
            f"**{sample['prompt']}**\n",
            *(f"* {when}: {_one_line(sample[when])}" for when in ("before", "after") if when in sample),
            "",
        ]
    auto = "AutoPeftModelForCausalLM" if causal else "AutoPeftModelForSequenceClassification"
    imports, config = _LOADED_AS[run.quantization]
    how = f",\n    quantization_config={config},\n" if config else ""
    use = _USE.format(auto=auto, imports=imports, how=how)
    lines += ["## Use\n", use, "## Recipe\n", f"```yaml\n{recipe.to_yaml()}```\n"]
    return "\n".join(lines)


def before_and_after(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table of results: what was measured, before, after; an empty cell where one is missing."""
    rows = []
    for name in ("loss", "perplexity", "accuracy"):
        before, after = metrics.get(f"eval_before_{name}"), metrics.get(f"eval_{name}")
        if before is not None or after is not None:
            rows.append((name, _number(before), _number(after)))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 1000 else f"{value:.4g}"


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
