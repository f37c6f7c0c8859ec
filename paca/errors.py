"""The errors that are paca's own; everything else is raised as the built-in error that fits."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """A backend that exists cannot be used on this machine; the message says why."""


class StaleColumnsError(RuntimeError):
    """A weight does not hold the columns that the adapter's values ask for."""


class BaseMismatchError(ValueError):
    """An adapter was made for another base model than the one it is loaded into."""


class OptimizerError(TypeError):
    """An optimizer cannot train as the adapter's options ask; the message says why and which one can."""


class AdapterError(ValueError):
    """A saved adapter cannot be used as asked; the message says why and what can be done."""
