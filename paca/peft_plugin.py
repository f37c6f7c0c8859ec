"""Makes PEFT know the method: `get_peft_model`, `PeftModel.from_pretrained` and everything that asks PEFT for a tuner by name.

PEFT has no entry point for methods from outside; its three tables are what its own methods register in too. A PEFT that brings a PaCA of its own
(0.22 and newer) uses the same file format, so that ours takes the name over when somebody imports paca: its config objects are accepted.
"""

from __future__ import annotations

import logging

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from paca.config import PEFT_TYPE, PacaConfig
from paca.model import PacaModel


def register() -> None:
    """Enter PaCA in PEFT's tables; doing it twice changes nothing."""
    before = PEFT_TYPE_TO_TUNER_MAPPING.get(PEFT_TYPE)
    if before not in (None, PacaModel):
        logging.getLogger("paca").info(
            "paca: takes the place of %s.%s for PEFT type PACA", before.__module__, before.__qualname__
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = PacaConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = PacaModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PacaModel.prefix
