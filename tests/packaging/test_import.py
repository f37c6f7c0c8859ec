"""What `import paca` brings and what it leaves alone."""

import importlib.metadata
import json
import sys

import pytest
from project import run_python

import paca

PROGRAM = """
import json
import torch, peft

started = []
torch.cuda._lazy_init = lambda: started.append("cuda")
torch.xpu._lazy_init = lambda: started.append("xpu")
before = set(sys.modules)
import paca
by_paca = [*started]
torch.cuda.init()
by_hand = started[len(by_paca):]
print(json.dumps({"before": sorted(before), "after": sorted(sys.modules), "by_paca": by_paca, "by_hand": by_hand}))
"""


@pytest.fixture(scope="module")
def imported():
    """Modules before and after `import paca` in a process of its own, and the devices that it started."""
    return json.loads(run_python(PROGRAM))


def test_importing_loads_nothing_that_torch_and_peft_have_not_loaded_already(imported):
    loaded = set(imported["after"]) - set(imported["before"])
    assert "paca.model" in loaded
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"paca"}


def test_importing_loads_no_trainer_no_plots_no_data_sets_and_no_accelerator_package(imported):
    loaded = set(imported["after"])
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


def test_importing_starts_no_device(imported):
    assert imported["by_paca"] == []
    assert imported["by_hand"] == ["cuda"], "the trap itself does not work"


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
