"""Compares predicted with measured peaks: `python -m paca.estimate.check`.

Each method trains a small model in a process of its own, whose highest memory is read from the device: on a CPU the
process's resident set, elsewhere what the device's allocator has given out. What was in use before the model was made,
after a smaller one was trained for the sake of everything that is loaded once, does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paca.bench.environment import exact_environment

STEPS = 2  # the second finds optimizer state and the first one's leftovers in place


@dataclass(frozen=True)
class Case:
    """What is trained: a Llama with random weights.

    Attributes:
        method: one of `paca.estimate.methods.METHODS`.
        dtype: of its weights and GEMMs.
        checkpointing: whether blocks are recomputed.
        r: trained columns, or LoRA's rank.
    """

    method: str
    dtype: str = "float32"
    checkpointing: bool = False
    r: int = 32
    layers: int = 4
    hidden: int = 512
    ffn: int = 1408
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 8192
    sequences: int = 1
    length: int = 512


@dataclass(frozen=True)
class Compared:
    """A case with its predicted and its measured peak, in bytes."""

    case: Case
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def compare(case: Case, backend: str = "cpu") -> Compared:
    """Predict here, measure in another process.

    Raises:
        RuntimeError: with the end of that process's error output, if it fails.
    """
    from paca.estimate.methods import METHODS
    from paca.estimate.step import footprint

    process = subprocess.run(
        [sys.executable, "-m", "paca.estimate.check", "--measure", json.dumps(asdict(case)), "--backend", backend],
        env=exact_environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"the process that measures {case.method}'s memory failed:\n{process.stderr[-2000:]}")
    predicted = footprint(_model(case), METHODS[case.method], _work(case)).peak
    return Compared(case, predicted, int(process.stdout.splitlines()[-1]))


def _model(case: Case) -> Any:
    import torch
    from transformers import LlamaConfig

    from paca.config import PacaConfig
    from paca.estimate.step import Model

    config = LlamaConfig(
        num_hidden_layers=case.layers,
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        vocab_size=case.vocabulary,
        max_position_embeddings=max(case.length, 2048),
    )
    settings = PacaConfig(r=case.r, paca_alpha=case.r, target_modules="all-linear", task_type="CAUSAL_LM")
    return Model(config, "causal_lm", getattr(torch, case.dtype), settings)


def _work(case: Case) -> Any:
    from paca.estimate.step import Work

    return Work(
        case.sequences, case.length, padded=False, checkpointing=case.checkpointing, autocast=False, accumulates=False,
        optim="adamw_torch_fused",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- in the measured process


def _measure(case: Case, backend_name: str) -> int:
    """Train, and return by how many bytes the highest use is above that before the model was made."""
    import gc
    import warnings

    import torch

    import paca

    warnings.simplefilter("ignore")  # libraries' remarks on each other
    torch.set_num_threads(1)
    backend = paca.set_backend(backend_name)
    small = Case(**asdict(case) | {"layers": 1, "hidden": 128, "ffn": 256, "heads": 2, "length": 64, "vocabulary": 256})
    _train(small, backend)
    gc.collect()
    backend.synchronize()
    before = backend.memory().allocated
    _train(case, backend)
    return int(backend.memory().peak - before)


def _train(case: Case, backend: Any) -> None:
    """Make the model and take some steps; memory that only its making took is not in the peak afterwards."""
    import gc

    import torch

    device = backend.device()
    model = _real(case, device)
    ids = torch.randint(case.vocabulary, (case.sequences, case.length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    gc.collect()
    backend.synchronize()
    backend.reset_peak_memory()
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    backend.synchronize()


def _real(case: Case, device: Any) -> Any:
    """The adapted model, made a layer at a time so that no dense copy of it stays in pieces of freed memory."""
    import torch
    from peft import LoraConfig, get_peft_model

    from paca.estimate.methods import METHODS

    method, described = METHODS[case.method], _model(case)
    torch.manual_seed(0)
    model = described.empty().to(device)
    if method.weight_format != "none":
        put_nf4_in(model, described.dtype, device)
    settings = described.settings
    if method.family == "lora":
        settings = LoraConfig(
            r=case.r, lora_alpha=case.r, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=not method.low)
    adapted = with_adapters_of(adapted, method, described.dtype)
    if case.checkpointing:
        enable = getattr(adapted, "activation_checkpointing_enable", None) or adapted.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return adapted


def with_adapters_of(adapted: Any, method: Any, dtype: Any) -> Any:
    """Give adapters the method's dtype as TRL does: over quantised weights PEFT leaves them in float32."""
    for parameter in adapted.parameters() if method.low else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted.train()


def put_nf4_in(model: Any, dtype: Any, device: Any) -> None:
    """Put NF4 layers in the place of all linears but the last, as `from_pretrained` does with a checkpoint."""
    from importlib import import_module

    from torch import nn

    layers = import_module("bitsandbytes.nn")
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            continue
        made = layers.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        made.weight = layers.Params4bit(
            module.weight.detach().cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        ).to(device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)
    model.is_loaded_in_4bit = model.is_quantized = True


def main() -> None:
    """Compare all methods, or measure one for such a comparison."""
    parser = argparse.ArgumentParser(prog="python -m paca.estimate.check", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cpu", help="where to measure")
    parser.add_argument("--dtype", default="float32", help="of weights and GEMMs")
    parser.add_argument("--methods", default="lora,paca,qlora,qpaca", help="comma-separated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the raw result there")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(_measure(Case(**json.loads(options.measure)), options.backend))
        sys.stdout.flush()
        os._exit(0)  # unloading models takes seconds and shows nothing
    found = []
    print(f"{'method':<14}{'checkpointing':<15}{'predicted MiB':>14}{'measured MiB':>14}{'ratio':>8}")
    for checkpointing in (False, True):
        for method in options.methods.split(","):
            compared = compare(Case(method, options.dtype, checkpointing), options.backend)
            found.append(compared)
            predicted, measured = compared.predicted / 2**20, compared.measured / 2**20
            said = "with" if checkpointing else "without"
            print(f"{method:<14}{said:<15}{predicted:>14.1f}{measured:>14.1f}{compared.ratio:>8.3f}", flush=True)
    if options.json:
        _write(options, found)


def _write(options: argparse.Namespace, found: list[Compared]) -> None:
    import paca
    from paca.bench.machine import describe
    from paca.whole import write_text

    command = f"python -m paca.estimate.check --backend {options.backend} --dtype {options.dtype}"
    rows = [
        {"case": asdict(one.case), "predicted": one.predicted, "measured": one.measured, "ratio": round(one.ratio, 4)}
        for one in found
    ]
    machine = describe(paca.set_backend(options.backend))
    write_text(options.json, json.dumps({"command": command, "machine": machine, "compared": rows}, indent=1))


if __name__ == "__main__":
    main()
