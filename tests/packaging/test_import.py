"""What `import paca` brings and what it leaves alone."""

import importlib.metadata
import json
import sys

import pytest
from project import run_python

import paca


def test_importing_loads_nothing_that_torch_and_peft_have_not_loaded_already():
    program = """
import json
import torch, peft
before = set(sys.modules)
import paca
print(json.dumps(sorted(name for name in set(sys.modules) - before)))
"""
    loaded = json.loads(run_python(program))
    assert "paca.model" in loaded
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"paca"}


def test_importing_loads_no_trainer_no_plots_no_data_sets_and_no_accelerator_package():
    program = """
import json
import paca
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(json.loads(run_python(program)))
    assert "paca.model" in loaded
    unwanted = {
        "datasets",
        "habana_frameworks",
        "matplotlib",
        "optimum",
        "paca.bench",
        "paca.recipe",
        "paca.training",
        "paca_cpu",
        "transformers.trainer",
        "trl",
    }
    assert loaded & unwanted == set()


def test_importing_starts_no_device():
    program = """
import torch

started = []
torch.cuda._lazy_init = lambda: started.append("cuda")
torch.xpu._lazy_init = lambda: started.append("xpu")
import paca
print(started)
torch.cuda.init()
print(started)
"""
    by_paca, by_hand = run_python(program).splitlines()
    assert by_paca == "[]"
    assert by_hand == "['cuda']", "the trap itself does not work"


def test_every_public_name_exists_and_is_listed_once_in_order():
    assert [name for name in paca.__all__ if not hasattr(paca, name)] == []
    assert paca.__all__ == sorted(set(paca.__all__))


def test_every_public_class_and_function_says_what_it_is():
    public = [getattr(paca, name) for name in paca.__all__ if name != "__version__"]
    assert [thing for thing in public if not (thing.__doc__ or "").strip()] == []


def test_the_version_agrees_with_the_installed_metadata():
    try:
        installed = importlib.metadata.version("paca-torch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("paca-torch is not installed here: a bare checkout has no metadata")
    assert paca.__version__ == installed
