"""torch's AdamW, bit for bit, for a part of an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


def adamw_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Returns the state before the first step; moments have the parameter's dtype."""
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def adamw_step(
    parameters: Iterable[nn.Parameter],
    states: Mapping[Tensor, dict[str, Tensor]],
    group: dict[str, Any],
) -> None:
    """Updates the parameters that have a gradient by the group's lr, betas, eps and weight_decay;
    initializes empty state."""
    moving = [parameter for parameter in parameters if parameter.grad is not None]
    if not moving:
        return
    own = [states[parameter] for parameter in moving]
    for parameter, state in zip(moving, own, strict=True):
        if not state:
            state.update(adamw_state(parameter))
    device = moving[0].device
    fused = device.type in ("cpu", "cuda")
    if fused:
        # The fused kernel needs `step` on the device; torch leaves it on the CPU when a checkpoint
        # that was read to the CPU is loaded.
        for state in own:
            state["step"] = state["step"].to(device)
    adamw(
        list[Tensor](moving),
        [parameter.grad for parameter in moving if parameter.grad is not None],
        [state["exp_avg"] for state in own],
        [state["exp_avg_sq"] for state in own],
        [],
        [state["step"] for state in own],
        fused=fused,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
