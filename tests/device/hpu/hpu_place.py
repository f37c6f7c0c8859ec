"""A pytest plugin that decides what stands behind `hpu` in a process, before transformers looks for it.

`PACA_TEST_HPU` says what: `standin` (the CPU under the vendor's interface), `emulated` (a device that torch calls hpu),
`device` (a real Gaudi; nothing is put in its place). `PT_HPU_LAZY_MODE` says the mode. Load it with `-p hpu_place`.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import emulated_device
import standin_bridge

PLACE = os.environ.get("PACA_TEST_HPU", "")
LAZY = os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"
WITHOUT = "run by ci/hpu.sh in a process of its own (PACA_TEST_HPU)"


def has_gaudi_trainer() -> bool:
    """Whether the real optimum-habana is installed."""
    try:
        return bool(version("optimum-habana"))
    except PackageNotFoundError:
        return False


def _prepare() -> None:
    if PLACE in ("standin", "emulated"):
        standin_bridge.install(LAZY)
    if PLACE == "emulated":
        if (why := emulated_device.why_not()) is not None:
            raise SystemExit(f"the emulated device cannot be built: {why}")
        emulated_device.install()
    if PLACE in ("standin", "emulated") and has_gaudi_trainer():
        standin_bridge.import_optimum_habana()


_prepare()
