"""Muon for hidden matrices and AdamW for everything else, in one optimizer.

Muon's update of a matrix is its momentum with all singular values brought near 1, so that
directions that gradients seldom have move as far as the frequent ones. Newton-Schulz iterations do
that with matrix products alone. The update is scaled to the size of AdamW's, so that one learning
rate and one weight decay serve both.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), for the
iteration and its coefficients; Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982,
for the scale and the decay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.hardware.device import supports_fast_bfloat16
from engine.hardware.sharding import full_tensor, shard_like
from engine.optim.adamw import adamw_step

P = TypeVar("P", bound=Tensor)

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0; the rest stays near 1
SMALLEST_NORM = 1e-7
UPDATE_RMS = 0.2  # the usual root mean square of AdamW's update, in learning rates
# The most numbers of equally shaped matrices that CUDA updates together: one by one, each matrix
# takes 20 launches, about 1,000 a step for GPT-2. Each number takes 10 bytes meanwhile, 340 MB in
# all. On a CPU batches would save nothing, and with several threads round differently.
CUDA_BATCH = 2**25


class Muon(torch.optim.Optimizer):
    """Muon for groups with `matrices` > 0, AdamW for groups with `matrices` = 0.

    matrices: how many equal matrices each parameter of the group stacks along its first dimension.
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
        """Updates every parameter that has a gradient; takes no closure."""
        assert closure is None
        for group in self.param_groups:
            if not group["matrices"]:
                adamw_step(group["params"], self.state, group)
                continue
            with_grad = [parameter for parameter in group["params"] if parameter.grad is not None]
            for batch in batch_by_shape(with_grad, group["params"][0].device):
                self._update_matrices(batch, group)

    def _update_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Updates parameters of one shape, all of which have gradients."""
        stacked = []
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
            nesterov = gradient.lerp(momentum, MOMENTUM)
            # Queries, keys, values and heads are matrices of their own: orthogonalized as one
            # matrix, the singular values of a large part would determine the update of a small one.
            # One batched product computes all of them.
            # Of sharded parameters every process orthogonalizes the whole.
            whole = full_tensor(nesterov)
            stacked.append(whole.reshape(group["matrices"], -1, parameter.shape[-1]))
        bfloat16 = supports_fast_bfloat16(parameters[0].device)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        scale = UPDATE_RMS * math.sqrt(max(stacked[0].shape[1:]))
        matrices = torch.cat(stacked) if len(stacked) > 1 else stacked[0]
        stacked.clear()  # frees the copies
        updates = orthogonalize(matrices, dtype).chunk(len(parameters))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            own = shard_like(update.reshape(parameter.shape), parameter)
            parameter.add_(own, alpha=-group["lr"] * scale)


def batch_by_shape(parameters: Sequence[P], device: torch.device) -> list[list[P]]:
    """Returns lists of parameters of one shape that are updated together; of one each on a CPU."""
    by_shape = defaultdict[torch.Size, list[P]](list)
    for parameter in parameters:
        by_shape[parameter.shape].append(parameter)
    numel = CUDA_BATCH if device.type == "cuda" else 0
    batches = list[list[P]]()
    for shape, same in by_shape.items():
        count = max(1, numel // shape.numel())
        batches += [same[start : start + count] for start in range(0, len(same), count)]
    return batches


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the matrices (count, rows, columns), each with its singular values brought near 1.

    dtype: of the products and of the result. The values end between 0.68 and 1.21, which trains as
    well as 1; those below 1/500 of the matrix's norm stay smaller. A matrix of zeros stays zero.
    """
    norms = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=SMALLEST_NORM)
    x: Tensor = (matrices / norms).to(dtype)
    # The Gram matrix below then has the shorter side: that is the cheaper one of the two.
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):  # x <- a x + b (x x^T) x + c (x x^T)^2 x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
