"""Makes PEFT know the method.

`get_peft_model`, `PeftModel.from_pretrained` and all else that asks PEFT for a tuner by name find it in PEFT's three
tables; PEFT has no entry point for methods from outside, and its own methods register there too. A PEFT that brings a
PaCA of its own (0.22 and newer) uses the same file format, so ours takes the name over when paca is imported and
accepts its config objects.
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
