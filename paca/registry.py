"""Which backends there are, and which one is in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from paca.backend import Backend
from paca.errors import BackendUnavailableError

GROUP = "paca.backends"
# Our own backends are listed here as well as in the entry points, so that a bare checkout works without being
# installed.
BUILT_IN = {
    "cpu": "paca_cpu:CPUBackend",
    "cuda": "paca_cuda:CUDABackend",
    "cuda-interpreted": "paca_cuda.interpreted:InterpretedBackend",
    "hpu": "paca_hpu:HPUBackend",
    "hpu-rehearsal": "paca_hpu:RehearsalBackend",
}

_current: Backend | None = None


def set_backend(name: str, **strategies: str) -> Backend:
    """Use a backend for the layers that are made from now on; layers that exist keep theirs.

    Args:
        name: a name from `available_backends()`.
        strategies: a name for each kind of strategy that should not be the backend's default, e.g. `gather="one_hot"`,
            `graph="compile"`.

    Returns:
        The backend, now in use.

    Raises:
        ValueError: if there is no such backend or strategy; the message lists those there are.
        BackendUnavailableError: if this machine cannot use it; the message says why.
    """
    global _current
    _current = _make(name, **strategies)
    return _current


def get_backend() -> Backend:
    """Return the backend in use.

    The first call decides if nobody has: `PACA_BACKEND`, else the best that this machine can use.
    """
    global _current
    if _current is None:
        name = os.environ.get("PACA_BACKEND")
        _current = _make(name) if name else _detect()
    return _current


@contextmanager
def use_backend(name: str, **strategies: str) -> Iterator[Backend]:
    """Use a backend for the layers made inside a `with` block; arguments and errors as in `set_backend`."""
    global _current
    before = _current
    try:
        yield set_backend(name, **strategies)
    finally:
        _current = before


def available_backends() -> dict[str, str | None]:
    """Return every known backend's name with the reason why this machine cannot use it, or None if it can."""
    return {name: _why_unavailable(name) for name in _known()}


def _why_unavailable(name: str) -> str | None:
    try:
        return _load(name).why_unavailable()
    except Exception as error:  # a broken third-party backend must not hide the others
        return f"it cannot be imported: {error}"


@cache
def _installed() -> dict[str, str]:
    """Read every installed package's entry points, which takes as long as some training steps do."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def _known() -> dict[str, str]:
    return _installed() | BUILT_IN


def _check_known(name: str) -> None:
    if name not in _known():
        _installed.cache_clear()  # it may have been installed since
    known = _known()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no backend {name!r}.{hint} Known: {', '.join(sorted(known))}.")


def _load(name: str) -> type[Backend]:
    _check_known(name)
    where = _known()[name]
    module, _, attribute = where.partition(":")
    found = getattr(import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise TypeError(f"backend {name!r}: {where} is not a subclass of paca.backend.Backend")
    if missing := sorted(found.__abstractmethods__):
        raise TypeError(f"backend {name!r}: {where} does not define {', '.join(missing)}")
    return found


def _make(name: str, **strategies: str) -> Backend:
    _check_known(name)
    if (why := _why_unavailable(name)) is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot be used here: {why}")
    return _load(name)(**strategies)


def _detect() -> Backend:
    reasons = available_backends()
    usable = [_load(name) for name, why in reasons.items() if why is None]
    if not usable:
        listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise BackendUnavailableError(f"no backend can be used here ({listed})")
    return max(usable, key=lambda backend: backend.priority)()
