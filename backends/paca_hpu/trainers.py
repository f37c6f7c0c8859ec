"""Which Trainer a Gaudi gets, and what it is told."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from paca.backend import GraphMode
from paca.errors import BackendUnavailableError

logger = logging.getLogger("paca")

# optimum-habana 1.21.2 is its last release and patches the classes of this transformers line.
GAUDI_TRANSFORMERS = "4.55"


def defaults(mode: GraphMode, compiler: str) -> dict[str, Any]:
    """TrainingArguments for a run in a graph mode; the caller leaves out those that the Trainer does not know."""
    arguments: dict[str, Any] = {"logging_nan_inf_filter": False}  # it reads the loss back after every backward
    if mode is GraphMode.COMPILE:
        arguments |= {"torch_compile": True, "torch_compile_backend": compiler}
    if mode is GraphMode.HPU_GRAPHS:
        arguments |= {"use_hpu_graphs_for_training": True}
    return arguments


def classes(mode: GraphMode) -> tuple[type[Any], type[Any]]:
    """The Trainer and TrainingArguments: optimum-habana's where it is installed and fits, else transformers' own.

    Raises:
        BackendUnavailableError: if HPU graphs were chosen, which transformers' own Trainer does not record.
    """
    why_not = why_not_gaudi_trainer()
    if why_not is None:
        from paca_hpu.gaudi_trainer import PacaGaudiTrainer, PacaGaudiTrainingArguments

        return PacaGaudiTrainer, PacaGaudiTrainingArguments
    if mode is GraphMode.HPU_GRAPHS:
        raise BackendUnavailableError(
            f"graph='hpu_graphs' needs GaudiTrainer, and {why_not}; choose graph='lazy', or call "
            "paca.get_backend().capture(model) in a loop of your own"
        )
    from transformers import Trainer, TrainingArguments

    logger.info("paca: transformers' own Trainer, because %s", why_not)
    return Trainer, TrainingArguments


def why_not_gaudi_trainer() -> str | None:
    """Say why GaudiTrainer cannot be used, or None if it can; nothing is imported."""
    try:
        found = version("optimum-habana")
    except PackageNotFoundError:
        return "optimum-habana is not installed"
    transformers = Version(version("transformers"))
    if f"{transformers.major}.{transformers.minor}" != GAUDI_TRANSFORMERS:
        return f"optimum-habana {found} needs transformers {GAUDI_TRANSFORMERS}, found {transformers}"
    return None
