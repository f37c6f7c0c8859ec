"""PEFT 0.22 brings a PaCA of its own under the same name: with it, ours takes over and reads its configs and files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel

ROOT = Path(__file__).parents[2]

# What PEFT 0.22 has done by the time its import is over, as far as others can see it.
NEWER_PEFT = """
import sys
from dataclasses import dataclass, field
from typing import Optional, Union

import peft
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.peft_types import register_peft_method

member = str.__new__(PeftType, "PACA")
member._name_, member._value_ = "PACA", "PACA"
PeftType._member_map_["PACA"] = PeftType._value2member_map_["PACA"] = member
PeftType._member_names_.append("PACA")
type.__setattr__(PeftType, "PACA", member)
assert PeftType("PACA") is PeftType.PACA and PeftType.PACA in list(PeftType)

@dataclass
class UpstreamConfig(PeftConfig):
    r: int = 8
    paca_alpha: int = 8
    target_modules: Optional[Union[list[str], str]] = None
    exclude_modules: Optional[Union[list[str], str]] = None
    layers_to_transform: Optional[Union[list[int], int]] = None
    layers_pattern: Optional[Union[list[str], str]] = None
    random_seed: Optional[int] = None
    init_weights: bool = True
    modules_to_save: Optional[list[str]] = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.PACA
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules

class UpstreamLayer(BaseTunerLayer):
    adapter_layer_names = ("paca_delta",)

class UpstreamModel(BaseTuner):
    prefix = "paca_"
    tuner_layer_cls = UpstreamLayer

register_peft_method(name="paca", config_cls=UpstreamConfig, model_cls=UpstreamModel, prefix="paca_")
peft.PacaConfig = UpstreamConfig
"""

START = "import tiny_models as tiny, torch\nimport paca\nfrom peft import get_peft_model, PeftModel, PeftConfig\n"


def run(code: str, *arguments: object) -> str:
    """Run code in a fresh interpreter with the newer PEFT; returns what it prints."""
    paths = [str(ROOT), str(ROOT / "backends"), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NEWER_PEFT + START + code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def adapter(tmp_path):
    """An adapter saved here, without the newer PEFT, and what its model says."""
    model = tiny.perturb(tiny.adapted(tiny.llama(), target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(tmp_path / "ours")
    torch.save(tiny.logits(model), tmp_path / "logits.pt")
    return tmp_path


@pytest.mark.slow
def test_importing_paca_beside_a_peft_that_has_its_own_does_not_collide(adapter):
    out = run(
        """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PACA] is paca.PacaModel
assert PEFT_TYPE_TO_CONFIG_MAPPING["PACA"] is paca.PacaConfig
assert sum(str(key.value) == "PACA" for key in PEFT_TYPE_TO_TUNER_MAPPING) == 1
assert paca.PacaConfig().peft_type is PeftType.PACA

# our adapter, loaded by name
folder, logits = sys.argv[1:3]
model = PeftModel.from_pretrained(tiny.llama(), folder)
assert type(model.peft_config["default"]) is paca.PacaConfig
assert torch.equal(tiny.logits(model), torch.load(logits))

# upstream's config object: trained, saved, loaded
theirs = peft.PacaConfig(r=4, paca_alpha=8, target_modules=["q_proj", "up_proj"], random_seed=5, task_type="CAUSAL_LM")
model = get_peft_model(tiny.llama(), theirs)
assert type(model.base_model) is paca.PacaModel
assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
losses = tiny.train(model, steps=4)
assert losses[-1] < losses[0]
model.save_pretrained(sys.argv[3])
torch.save(tiny.logits(model), sys.argv[4])
print("done")
""",
        adapter / "ours",
        adapter / "logits.pt",
        adapter / "theirs",
        adapter / "theirs.pt",
    )
    assert out.strip().endswith("done")
    # and what was made with upstream's config loads here, where PEFT knows no PaCA
    loaded = PeftModel.from_pretrained(tiny.llama(), adapter / "theirs")
    assert torch.equal(tiny.logits(loaded), torch.load(adapter / "theirs.pt"))


def test_importing_paca_twice_registers_once():
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    import paca

    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    paca.register()
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
