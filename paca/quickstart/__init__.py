"""A real pretrained model and real text for the first run, from the package registry: no hub, no account, no download.

A recipe names them `quickstart:NAME`; `resolve` turns such a name into a local path.
"""

from paca.quickstart.catalogue import known_names, resolve
from paca.quickstart.package import QuickstartError

__all__ = ["QuickstartError", "known_names", "resolve"]
