"""Versions of the software that a result depends on, as reports and records tell them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from paca._version import __version__


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of paca, of torch with its build, and of those packages that are installed."""
    found = {"paca": __version__, "torch": str(torch.__version__)}  # not every wheel's metadata has the build
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
