from .FusedAdamW import FusedAdamW
