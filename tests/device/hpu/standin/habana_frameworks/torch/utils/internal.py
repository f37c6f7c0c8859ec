import os


def is_lazy():
    return os.environ.get("PT_HPU_LAZY_MODE", "1") != "0"  # asked anew each time, as by the bridge
