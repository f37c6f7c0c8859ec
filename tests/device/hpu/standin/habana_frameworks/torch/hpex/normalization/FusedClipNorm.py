import torch

from ...calls import note
from ...core import mark_step


class FusedClipNorm:
    """Arguments and `mark_step` places of the vendor's."""

    def __init__(self, parameters, max_norm):
        first = next(iter(parameters))
        self.max_norm = torch.full((1,), float(max_norm)).to(first.device)

    @torch.no_grad()
    def clip_norm(self, parameters):
        mark_step()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return torch.tensor(0.0)
        total = torch.stack([gradient.float().norm() for gradient in gradients]).norm().reshape(1)
        factor = torch.clamp(self.max_norm / (total + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
        note("fused_clip_norm", gradients=len(gradients))
        mark_step()
        return total
