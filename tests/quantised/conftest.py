"""Tiny quantised models, by the libraries themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats import needs_its_library, quantisation
from tiny_models import llama
from transformers import LlamaForCausalLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that is not quantised."""
    folder = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture
def quantised(checkpoint: Path) -> Callable[[str], LlamaForCausalLM]:
    """Load the checkpoint in a format."""

    def load(name: str) -> LlamaForCausalLM:
        needs_its_library(name)
        return LlamaForCausalLM.from_pretrained(checkpoint, quantization_config=quantisation(name), dtype=torch.float32)

    return load
