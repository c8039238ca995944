"""Muon for hidden matrices and AdamW for everything else, in one optimizer.

The one idea: a matrix's step is its momentum with all singular values brought near 1, so that
directions seldom seen in the gradient move as far as the frequent ones. Newton-Schulz iterations do
that with matrix products alone. The step is scaled to the size of AdamW's, so that its learning
rate and weight decay serve for both.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), for the
iteration and its coefficients; Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982,
for the scale and the decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.hardware.world import supports_fast_bfloat16
from engine.optim.adamw import adamw_step

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0; the rest stays near 1
SMALLEST_NORM = 1e-7
STEP_RMS = 0.2  # root mean square of AdamW's usual step, in learning rates


class Muon(torch.optim.Optimizer):
    """Groups with `matrices` > 0 take Muon's step, that many stacked in each parameter along its
    first dimension; groups with 0 take AdamW's.

    The momentum and the moments have the dtype of their parameter.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "matrices": 0, "betas": betas, "eps": eps}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for parameter in group["params"] if group["matrices"] else ():
                assert parameter.dim() >= 2 and not parameter.shape[0] % group["matrices"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient; takes no closure."""
        assert closure is None
        for group in self.param_groups:
            if not group["matrices"]:
                adamw_step(group["params"], self.state, group)
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._muon(parameter, group)

    def _muon(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
        stacked = ahead.reshape(group["matrices"], -1, parameter.shape[-1])
        bfloat16 = supports_fast_bfloat16(parameter.device)
        update = orthogonalize(stacked, torch.bfloat16 if bfloat16 else torch.float32)
        scale = STEP_RMS * math.sqrt(max(stacked.shape[1:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Each of the matrices (count, rows, columns) with its singular values brought near 1.

    dtype: of the products and of the result. The values end between 0.68 and 1.21, which trains as
    well as 1; those below 1/500 of the matrix's norm stay smaller. A matrix of zeros stays one.
    """
    norms = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=SMALLEST_NORM)
    x: Tensor = (matrices / norms).to(dtype)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT  # the products below are of the shorter side
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
