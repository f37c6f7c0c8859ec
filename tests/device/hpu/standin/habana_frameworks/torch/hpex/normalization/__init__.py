from .FusedClipNorm import FusedClipNorm
