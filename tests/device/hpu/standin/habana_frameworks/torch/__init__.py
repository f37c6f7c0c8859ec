from . import core, hpu
