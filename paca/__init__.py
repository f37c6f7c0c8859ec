"""Fine-tune large PyTorch models by Partial Connection Adaptation, with the same result on every device."""

from paca._version import __version__
from paca.backend import Backend, Capabilities, GraphMode, Memory, Ops
from paca.bank import AdapterBank
from paca.calibration import calibrate
from paca.config import PacaConfig
from paca.convert import convert_to_lora
from paca.errors import BackendUnavailableError, BaseMismatchError, StaleColumnsError
from paca.freshness import refresh, verify
from paca.layer import PacaLayer
from paca.model import PacaModel
from paca.peft_plugin import register
from paca.registry import available_backends, get_backend, set_backend, use_backend
from paca.requantise import merge_requantised
from paca.trainer import trainer_class, training_arguments_class

__all__ = [
    "AdapterBank",
    "Backend",
    "BackendUnavailableError",
    "BaseMismatchError",
    "Capabilities",
    "GraphMode",
    "Memory",
    "Ops",
    "PacaConfig",
    "PacaLayer",
    "PacaModel",
    "StaleColumnsError",
    "__version__",
    "available_backends",
    "calibrate",
    "convert_to_lora",
    "get_backend",
    "merge_requantised",
    "refresh",
    "set_backend",
    "trainer_class",
    "training_arguments_class",
    "use_backend",
    "verify",
]

register()
