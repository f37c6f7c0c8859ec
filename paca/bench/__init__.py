"""`paca bench`: what PaCA costs, beside a frozen model, LoRA, DoRA and full fine-tuning, measured on this machine."""

from __future__ import annotations

from paca.bench.command import main

__all__ = ["main"]
