"""A third party's backend, as small as one can be."""

from __future__ import annotations

import torch

from paca.backend import Backend, Capabilities, GraphMode, Memory


class UnfinishedBackend(Backend):
    name = "unfinished"
    priority = 100

    @classmethod
    def why_unavailable(cls):
        return None


class DummyBackend(Backend):
    name = "dummy"
    priority = 1

    @classmethod
    def why_unavailable(cls):
        return None

    @property
    def capabilities(self):
        return Capabilities(dtypes=frozenset({torch.float32}), graph_modes=(GraphMode.EAGER,))

    def device(self, index=None):
        return torch.device("cpu")

    def describe(self):
        return "nothing"

    def memory(self):
        return Memory(0, 0, 0)

    def reset_peak_memory(self):
        pass


class AsleepBackend(DummyBackend):
    name = "asleep"
    priority = 100

    @classmethod
    def why_unavailable(cls):
        return "it sleeps"


class Impostor:
    pass
