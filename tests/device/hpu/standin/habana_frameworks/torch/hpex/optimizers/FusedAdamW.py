import math

import torch
from torch.optim import Optimizer

from ...calls import note
from ...core import mark_step

# One opaque operation, as the bridge's: the step size is a tensor, so a changing learning rate is no new graph.
_LIBRARY = torch.library.Library("hpu", "FRAGMENT")
_LIBRARY.define(
    "optimizer_adamw(Tensor[] gradients, Tensor(a!)[] weights, Tensor(b!)[] means, Tensor(c!)[] squares, "
    "Tensor negative_step, float beta1, float beta2, float eps, Tensor decay) -> ()"
)


def _adamw(gradients, weights, means, squares, negative_step, beta1, beta2, eps, decay):
    for gradient, weight, mean, square in zip(gradients, weights, means, squares, strict=True):
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = mean.div(square.sqrt().add_(eps)).mul_(negative_step.to(weight.dtype))
        weight.mul_(decay.to(weight.dtype)).add_(update)


_LIBRARY.impl("optimizer_adamw", _adamw, "CompositeExplicitAutograd")


class FusedAdamW(Optimizer):
    """Arguments, state keys and `mark_step` places of the vendor's: one before each group, one after the step."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, bias_correction=True, moments_dtype=None
    ):
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            mark_step()
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            for parameter in trained:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    for moment in ("exp_avg", "exp_avg_sq"):  # made on the host, so they are no part of a graph
                        state[moment] = torch.zeros(parameter.shape, dtype=parameter.dtype).to(parameter.device)
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            size = group["lr"]
            if group["bias_correction"]:
                size *= math.sqrt(1 - beta2 ** group["step"]) / (1 - beta1 ** group["step"])
            device = trained[0].device
            torch.ops.hpu.optimizer_adamw(
                [p.grad.data for p in trained],
                [p.data for p in trained],
                [self.state[p]["exp_avg"] for p in trained],
                [self.state[p]["exp_avg_sq"] for p in trained],
                torch.tensor([-size]).to(device, non_blocking=True),
                beta1,
                beta2,
                group["eps"],
                torch.tensor([1.0 - group["weight_decay"] * group["lr"]]).to(device, non_blocking=True),
            )
            note("optimizer_adamw", parameters=len(trained))
        mark_step()
        return loss
