import os

# Read once, when the package is imported, as the bridge does.
_LAZY = os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"


def is_lazy():
    return _LAZY
