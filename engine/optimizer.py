"""Optimizers: parameter groups and the step's bookkeeping around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from config import OptimizerConfig
from engine.muon import Muon


class HasMatrices(Protocol):
    """What Muon asks of a model."""

    def matrices(self) -> Iterable[tuple[nn.Parameter, int]]:
        """The hidden weight matrices, each with the number stacked in it along dimension 0."""


def build_optimizer(
    model: nn.Module, optimizer: OptimizerConfig, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, or Muon for hidden matrices beside it, by `optimizer.name`.

    Weights decay in matrices only: biases, gains and other vectors are left alone.
    """
    if optimizer.name == "muon":
        return _muon(model, optimizer, weight_decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def _muon(model: nn.Module, optimizer: OptimizerConfig, weight_decay: float) -> Muon:
    stacked = {id(p): count for p, count in cast(HasMatrices, model).matrices()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = stacked.get(id(parameter), 0), parameter.dim() >= 2
            groups.setdefault(key, []).append(parameter)
    return Muon(
        [
            {"params": params, "matrices": count, "weight_decay": weight_decay if decays else 0.0}
            for (count, decays), params in sorted(groups.items(), reverse=True)
        ],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Gives every group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = value


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores the moments; hyperparameters stay those of the present config."""
    options = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm (a scalar) of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scales gradients whose `gradient_norm` is `norm` down to the norm `limit`."""
    nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
