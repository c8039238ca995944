"""torch's AdamW, bit for bit, for some of the parameters of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


def adamw_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state before the first step; moments have the dtype of the parameter."""
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
    """Moves those with a gradient by the group's lr, betas, eps and weight_decay; state that is
    empty is made."""
    moving = [parameter for parameter in parameters if parameter.grad is not None]
    if not moving:
        return
    for parameter in moving:
        if not states[parameter]:
            states[parameter].update(adamw_state(parameter))
    fused = moving[0].device.type in ("cpu", "cuda")
    own = [states[parameter] for parameter in moving]
    if fused:  # a checkpoint is loaded on the CPU, and torch leaves this part there
        for state in own:
            state["step"] = state["step"].to(moving[0].device)
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
