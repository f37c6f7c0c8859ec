"""The formats that the libraries on a CPU know."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

FORMATS = ["nf4", "nf4-double", "fp4", "int8", "torchao-int8", "torchao-float8", "torchao-int4", "torchao-intx4"]
LIBRARY = {"torchao": "torchao"}


def needs_its_library(name: str) -> None:
    """Skip where the package is missing, and say so."""
    library = LIBRARY.get(name.partition("-")[0], "bitsandbytes")
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def quantisation(name: str) -> BitsAndBytesConfig | TorchAoConfig:
    """The transformers settings of a format."""
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if name == "torchao-float8":
        from torchao.quantization import Float8WeightOnlyConfig

        return TorchAoConfig(Float8WeightOnlyConfig())
    if name == "torchao-int4":  # packed, and multiplied by a kernel of the CPU; there is no dequantising it
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    if name == "torchao-intx4":
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    kind, _, double = name.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=torch.float32,
    )
