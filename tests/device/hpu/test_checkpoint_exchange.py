"""A checkpoint of GaudiTrainer resumes on the Trainer of transformers 5, in its environment, and the reverse."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import hpu_place
import pytest
import torch
from exchanged_run import HALF, STEPS, run

import paca
from paca import registry
from paca.checkpoint import random_states_of_devices
from paca_hpu import HPUBackend

OTHER = os.environ.get("PACA_OTHER_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(hpu_place.PLACE != "standin" or not hpu_place.has_gaudi_trainer(), reason=hpu_place.WITHOUT),
    pytest.mark.skipif(not OTHER, reason="PACA_OTHER_PYTHON names no interpreter with transformers 5"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each Trainer held, of a whole run and of one resumed from the other's checkpoint."""
    folder = tmp_path_factory.mktemp("exchange")
    half = f"checkpoint-{HALF}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HPUBackend, "why_unavailable", classmethod(lambda cls: None))
        patch.setattr(HPUBackend, "device", lambda self, index=None: torch.device("cpu"))  # the stand-in's
        patch.setattr(registry, "_current", None)
        paca.set_backend("hpu")
        whole = run(folder / "gaudi")
        plain = in_the_other_environment(folder, folder / "gaudi" / half)
        said = Said()
        logging.getLogger("paca").addHandler(said)
        resumed = run(folder / "from_plain", folder / "whole" / half)
        logging.getLogger("paca").removeHandler(said)
    return {"gaudi": {"whole": whole, "resumed": resumed}, "plain": plain, "said": said.lines, "folder": folder}


class Said(logging.Handler):
    """Collects warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def in_the_other_environment(folder, checkpoint):
    """The same by transformers 5's own Trainer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PACA_", "PT_HPU"))}
    command = [OTHER, str(Path(__file__).with_name("exchanged_run.py")), str(folder), str(checkpoint)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "held.pt", weights_only=False)
    assert found.pop("transformers").startswith("5.")
    return found


def same(found, wanted):
    return len(found) == len(wanted) > 0 and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(("first", "second"), [("gaudi", "plain"), ("plain", "gaudi")])
def test_everything_that_goes_on_has_its_bits_on_the_other_trainer(runs, first, second):
    saved, resumed = runs[first]["whole"]["saved"], runs[second]["resumed"]
    begun, stepping = resumed["begun"], resumed["first step"]
    for bits in ("deltas", "means", "squares"):
        assert same(begun[bits], saved[bits]), bits
    assert same(stepping["columns"], saved["columns"])
    for name in ("steps", "learning_rate", "weight_decay", "scheduler", "global_step", "losses"):
        assert begun[name] == saved[name], name
    assert begun["steps"] == {HALF}
    assert torch.equal(stepping["random"], saved["random"])  # the host's carries over, the device's does not


@pytest.mark.parametrize(("first", "second"), [("gaudi", "plain"), ("plain", "gaudi")])
def test_training_goes_on_as_if_nothing_had_changed(runs, first, second):
    ended, wanted = runs[second]["resumed"]["ended"], runs[first]["whole"]["ended"]
    assert ended["steps"] == {STEPS}
    assert ended["global_step"] == STEPS
    assert ended["scheduler"] == wanted["scheduler"]
    assert ended["losses"] == pytest.approx(wanted["losses"], rel=1e-3)
    assert ended["losses"][-1] < ended["losses"][HALF] < ended["losses"][HALF - 1]


def test_the_random_state_that_cannot_carry_over_is_said_once(runs):
    half = f"checkpoint-{HALF}"
    assert random_states_of_devices(runs["folder"] / "gaudi" / half) == {"hpu"}
    assert random_states_of_devices(runs["folder"] / "whole" / half) == set()
    assert [line for line in runs["said"] if "the random state of the HPU starts anew" in line] == runs["said"][-1:]
