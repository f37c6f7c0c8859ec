"""What torch.hpu offers; `use_emulated_device` puts a device behind it."""

import contextlib

from ..calls import note
from . import random
from .random import get_rng_state, get_rng_state_all, manual_seed, manual_seed_all, set_rng_state, set_rng_state_all

_device = None  # the emulated device's statistics, if there is one


def use_emulated_device(statistics):
    """From now on there is one device; `statistics` tells what its allocator did and forgets its peak."""
    global _device
    _device = statistics


def is_available():
    return _device is not None  # accelerate and transformers stay on the CPU without one


def device_count():
    return int(is_available())


def is_initialized():
    return True


def init():
    pass


_lazy_init = init


def _is_in_bad_fork():
    return False


def current_device():
    return 0


def set_device(device):
    pass


def get_device_name(device=None):
    return "GAUDI2 (stand-in)"


def synchronize(device=None):
    note("synchronize")


def enable_dynamic_shape():
    note("dynamic_shape", on=True)


def disable_dynamic_shape():
    note("dynamic_shape", on=False)


def memory_stats(device=None):
    found = _device.read() if _device else {"InUse": 0, "MaxInUse": 0, "NumAllocs": 0, "NumFrees": 0}
    return {"Limit": 96 * 2**30, **found}


def memory_allocated(device=None):
    return memory_stats()["InUse"]


def max_memory_allocated(device=None):
    return memory_stats()["MaxInUse"]


def reset_peak_memory_stats(device=None):
    note("reset_peak_memory_stats")
    if _device:
        _device.reset_peak()


@contextlib.contextmanager
def sdp_kernel(*args, **kwargs):
    yield


class Stream:
    pass


@contextlib.contextmanager
def stream(chosen):
    yield


def wrap_in_hpu_graph(module, **options):
    note("wrap_in_hpu_graph", module=type(module).__name__)
    return module


class ModuleCacher:
    def __init__(self, max_graphs=10):
        self.max_graphs = max_graphs

    def __call__(self, model, use_lfu=False, inplace=False, allow_unused_input=False, asynchronous=False, **options):
        note("ModuleCacher", model=type(model).__name__, inplace=inplace)
        return model


class device(contextlib.ContextDecorator):
    def __init__(self, chosen=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def get_amp_supported_dtype():
    import torch

    return [torch.bfloat16, torch.float16]


def is_bf16_supported():
    return True


def is_autocast_hpu_enabled():
    import torch

    return torch.is_autocast_enabled("hpu")


def get_autocast_hpu_dtype():
    import torch

    return torch.get_autocast_dtype("hpu")
