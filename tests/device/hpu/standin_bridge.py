"""Puts the stand-in for `habana_frameworks` where Python finds it, and lets the real optimum-habana be imported on it.

Never where the vendor's package is installed: a stand-in must not shadow it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest import mock

STANDIN = Path(__file__).parent / "standin"


def install(lazy: bool) -> None:
    """Make `habana_frameworks` the stand-in, in one mode, for the rest of this process.

    Raises:
        RuntimeError: if the vendor's own is installed, or the mode is fixed already.
    """
    found = find_spec("habana_frameworks")
    if found is not None and STANDIN not in Path(str(found.origin)).parents:
        raise RuntimeError(f"habana_frameworks is installed ({found.origin}): run the tests on it, not on the stand-in")
    mode = str(int(lazy))
    if "habana_frameworks.torch" in sys.modules and os.environ.get("PT_HPU_LAZY_MODE") != mode:
        raise RuntimeError("the mode of a process cannot change: start another")
    os.environ["PT_HPU_LAZY_MODE"] = mode
    sys.path.insert(0, str(STANDIN))


def import_optimum_habana() -> None:
    """Import the real optimum-habana, with all that its arguments import later."""
    with _what_it_asks_for():
        importlib.import_module("optimum.habana")
        importlib.import_module("optimum.habana.transformers.modeling_utils")


@contextmanager
def _what_it_asks_for() -> Iterator[None]:
    """What optimum-habana 1.21.2 asks of a machine when it is imported, and a machine without Gaudi lacks.

    It asks pip for the vendor's version and `hl-smi` for the driver's; one tokenizer imports torchvision, and its
    Trainer for sentence-transformers comes along. None of these is used by its GaudiTrainer.
    """
    import optimum

    assert optimum  # the parent of one of these must be there first
    run = subprocess.run
    transforms = _module("torchvision.transforms")
    absent = {
        "torchvision": _module("torchvision", transforms=transforms),
        "torchvision.transforms": transforms,
        "optimum.habana.sentence_transformers": _module(
            "optimum.habana.sentence_transformers",
            SentenceTransformerGaudiTrainer=object,
            SentenceTransformerGaudiTrainingArguments=object,
        ),
    }
    absent = {name: module for name, module in absent.items() if name not in sys.modules}

    def answer(command, *args, **options):
        if isinstance(command, str) and "habana-torch-plugin" in command:
            return subprocess.CompletedProcess(command, 0, "habana-torch-plugin 1.24.0\n", "")
        if command == "hl-smi":
            return subprocess.CompletedProcess(command, 1, "", "")
        return run(command, *args, **options)

    sys.modules.update(absent)
    try:
        with mock.patch.object(subprocess, "run", answer):
            yield
    finally:
        for name in absent:
            del sys.modules[name]


def _module(name: str, **content: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
    vars(module).update(content)
    return module
