"""Optimizers: parameter groups and the step's bookkeeping around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from config import OptimizerConfig
from engine.optim.adamw_4bit import AdamW4bit
from engine.optim.muon import Muon
from engine.precision.tensor_4bit import import_bitsandbytes

_BITSANDBYTES = "__bnb_optimizer_quant_state__"  # under which it saves its moments


class HasMatrices(Protocol):
    """What Muon asks of a model."""

    def matrices(self) -> Iterable[tuple[nn.Parameter, int]]:
        """The hidden weight matrices, each with the number stacked in it along dimension 0."""


def build_optimizer(
    model: nn.Module, optimizer: OptimizerConfig, weight_decay: float, four_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW, or Muon for hidden matrices beside it, by `optimizer.name`.

    Weights decay in matrices only: biases, gains and other vectors are left alone. four_bit: AdamW
    keeps its moments in 4 bits. ConfigError where adamw_8bit lacks its library.
    """
    if optimizer.name == "muon":
        return _muon(model, optimizer, weight_decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas, eps = (optimizer.beta1, optimizer.beta2), optimizer.eps
    if four_bit:
        return AdamW4bit(groups, betas, eps)
    if optimizer.name == "adamw_8bit":
        return _adamw_8bit(groups, betas, eps)
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=fused)


def _adamw_8bit(
    groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    library = import_bitsandbytes("8-bit moments", "optimizer.name: adamw")
    optimizer: torch.optim.Optimizer = library.optim.AdamW8bit(groups, betas=betas, eps=eps)
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):  # now, so that its size is known
            cast(Any, optimizer).init_state(group, parameter, number, place)
    return optimizer


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


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restores the moments; hyperparameters stay those of the present config."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def check_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], steps: int, skipped: bool
) -> None:
    """Raises ValueError unless `saved` has what this optimizer keeps of each of its parameters.

    steps: made before. skipped: whether all of them may have been skipped, as float16 does, so that
    nothing was kept yet.
    """
    numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if [group["params"] for group in saved["param_groups"]] != numbers:
        raise ValueError("optimizer.param_groups are not those of this model")
    states = saved["state"]
    if skipped and not states:
        return
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if odd := sorted(set(states) ^ set(range(len(parameters)))):
        raise ValueError(f"optimizer.state.{odd[0]} is not of these {len(parameters)} parameters")
    for number, (parameter, group) in enumerate(parameters):
        own = optimizer.state.get(parameter) or _first_state(parameter, group)
        found = dict(states[number])
        if isinstance(packed := found.get(_BITSANDBYTES), dict):
            found = {**found, **packed}
            del found[_BITSANDBYTES]
        for name in sorted({*own, *found}):
            place = f"optimizer.state.{number}.{name}"
            if name not in own or name not in found:
                raise ValueError(f"{place} is {'not known here' if name not in own else 'missing'}")
            if not _same_kind(own[name], value := found[name]):
                raise ValueError(f"{place} is {_kind(value)}, expected {_kind(own[name])}")
            if name == "step" and not 0 <= float(value) <= steps:
                raise ValueError(f"{place} is {float(value)}, of {steps} steps")


def _first_state(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
    """What Muon or torch's AdamW will keep of a parameter, in shape and dtype."""
    if group.get("matrices"):
        return {"momentum": parameter}
    return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}


def _same_kind(own: object, saved: object) -> bool:
    if not isinstance(own, Tensor) or not isinstance(saved, Tensor):
        return type(own) is type(saved)
    floats = own.is_floating_point() and saved.is_floating_point()
    return own.shape == saved.shape and (own.dtype == saved.dtype or floats)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return ascii(value)[:40]


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """(bytes of state in few bits, parameters it is of, parameters with other state), counted from
    storages; what several parameters share counts once.
    """
    storages: dict[int, int] = {}
    low = others = 0
    for parameter, state in optimizer.state.items():
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        if any(tensor.dtype == torch.uint8 for tensor in tensors):
            low += parameter.numel()
            whole = (tensor.untyped_storage() for tensor in tensors)
            storages |= {storage._cdata: storage.nbytes() for storage in whole}
        else:
            others += parameter.numel()
    return sum(storages.values()), low, others


def optimizer_lines(optimizer: torch.optim.Optimizer) -> list[str]:
    """What a start says of moments in 4 or 8 bits: their size, as it is; nothing of others."""
    bits = {"AdamW4bit": 4, "AdamW8bit": 8}.get(type(optimizer).__name__)
    if bits is None:
        return []
    size, low, others = state_bytes(optimizer)
    if not low:
        return [f"AdamW with {bits}-bit moments: none, {others:,} parameters are in small tensors"]
    return [
        f"AdamW with {bits}-bit moments: {size / low:.3f} bytes for each of {low:,} parameters; "
        f"{others:,} in float32"
    ]


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm (a scalar) of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scales gradients whose `gradient_norm` is `norm` down to the norm `limit`."""
    nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
