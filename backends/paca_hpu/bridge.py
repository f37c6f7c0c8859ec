"""The vendor's bridge, `habana_frameworks.torch`: whether it is there, the mode it runs in, and what is asked of it.

It is imported only when a device is used. Its mode belongs to the process: `PT_HPU_LAZY_MODE` is read once, when the
bridge is imported, and torch imports it by itself (`TORCH_DEVICE_BACKEND_AUTOLOAD`).
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODE = "PT_HPU_LAZY_MODE"
# "0" is the vendor's default since release 1.21 (docs.habana.ai, Runtime Flags); optimum-habana still assumes "1", so
# the variable is always set by the time that either is imported.
DEFAULT_MODE = "0"
_MODES = {"0": False, "1": True}
# The bridge loads another library in each mode (habana_frameworks/torch/__init__.py). Its own `is_lazy` reads the
# variable again whenever it is asked, and so does not tell what was loaded.
_LIBRARY = re.compile(r"libhabana_pytorch(2?)_plugin(\.upstream)?\.so")
_LOADED = Path("/proc/self/maps")


def why_missing() -> str | None:
    """Say why no Gaudi can be used, or None if one can; imports the bridge if it is installed."""
    if find_spec("habana_frameworks") is None:
        return (
            "habana_frameworks is not installed; it comes with the Gaudi software and its images only (docs/gaudi.md)"
        )
    if (wrong := why_wrong_mode()) is not None:
        return wrong
    try:
        return None if hpu().is_available() else "habana_frameworks finds no device; `hl-smi` should list one"
    except Exception as error:  # a broken installation fails in many ways, and is a reason like any other
        return f"habana_frameworks cannot be imported: {error}"


def why_wrong_mode() -> str | None:
    """Say what is wrong with the process's mode, or None."""
    wanted = os.environ.setdefault(MODE, DEFAULT_MODE)
    if wanted not in _MODES:
        return f"{MODE} is {wanted!r}; set it to 0 (eager and torch.compile) or 1 (lazy) before Python starts"
    if _is_imported() and _bridge_is_lazy() != _MODES[wanted]:
        return (
            f"{MODE} is {wanted}, but habana_frameworks was imported while it was not; set it in the environment "
            "before Python starts (torch imports the bridge by itself)"
        )
    return None


def is_lazy() -> bool:
    """Whether this process collects operations into graphs and runs them at `mark_step` (the legacy mode)."""
    return _MODES.get(os.environ.get(MODE, DEFAULT_MODE), False)


def hpu() -> Any:
    """Return the module behind `torch.hpu`."""
    import_module("habana_frameworks.torch")
    return import_module("habana_frameworks.torch.hpu")


def end_graph() -> None:
    """Send what was collected to the device; nothing outside lazy mode."""
    if is_lazy() and _is_imported():
        import_module("habana_frameworks.torch.core").mark_step()


def version() -> str:
    """The release of the bridge, for people."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("habana-torch-plugin")
    except PackageNotFoundError:
        return "of unknown version"


def _is_imported() -> bool:
    return "habana_frameworks.torch" in sys.modules


def _bridge_is_lazy() -> bool:
    """Whether the bridge runs lazy, by the library that it has loaded; by its own word where that has another name."""
    with suppress(OSError):
        if (loaded := _LIBRARY.search(_LOADED.read_text(encoding="utf-8", errors="replace"))) is not None:
            return not loaded[1]
    return bool(import_module("habana_frameworks.torch.utils.internal").is_lazy())
