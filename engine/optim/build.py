"""Builds the optimizer; checks and measures its state; norms and clips gradients."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from config import OptimizerConfig
from engine.hardware.sharding import full_tensor, shard_like
from engine.optim.adamw_4bit import AdamW4bit
from engine.optim.muon import Muon
from engine.precision.tensor_4bit import import_bitsandbytes
from model.interface import LanguageModel

_BITSANDBYTES = "__bnb_optimizer_quant_state__"  # bitsandbytes saves its moments under this key


def build_optimizer(
    model: nn.Module, optimizer: OptimizerConfig, weight_decay: float, four_bit: bool = False
) -> torch.optim.Optimizer:
    """Returns AdamW for the trained parameters, or Muon for hidden matrices and AdamW beside it.

    Weights decay in matrices only: biases, gains and other vectors do not. four_bit: AdamW keeps
    its moments in 4 bits. Raises ConfigError if adamw_8bit lacks its library.
    """
    betas, eps = (optimizer.beta1, optimizer.beta2), optimizer.eps
    if optimizer.name == "muon":
        assert isinstance(model, LanguageModel), "Muon needs to know the hidden weights"
        return Muon(_muon_groups(model, weight_decay), betas, eps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
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
    optimizer = library.optim.AdamW8bit(groups, betas=betas, eps=eps)
    # Created now instead of in the first step, so that its size can be reported at the start.
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, group_index, index)
    return cast(torch.optim.Optimizer, optimizer)


def _muon_groups(model: LanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """Returns one group per number of stacked matrices, and AdamW's groups with 0 of them."""
    stacked = {id(p): count for p, count in model.hidden_weights()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = stacked.get(id(parameter), 0), parameter.dim() >= 2
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "matrices": count, "weight_decay": weight_decay if decays else 0.0}
        for (count, decays), params in sorted(groups.items(), reverse=True)
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the optimizer heeds `found_inf`: only torch's fused AdamW does."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) is torch.optim.AdamW and fused


def attach_found_inf(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """Returns a flag () on the device, 0 at first. While it is 1, optimizer steps change neither
    weights nor state: the kernel reads the flag, which torch.amp.GradScaler uses too."""
    found_inf = torch.zeros((), device=device)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # torch's AdamW.step looks for it
    return found_inf


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restores the moments, of which sharded parameters take their slices; hyperparameters stay
    those of the present config."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own_part(value: Any, parameter: Tensor) -> Any:
        is_moment = isinstance(value, Tensor) and value.shape == parameter.shape
        return shard_like(value, parameter) if is_moment else value

    state = {
        number: {name: own_part(value, parameters[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # torch keeps tensors that need not move: these would keep the checkpoint's file mapped.
    for values in optimizer.state.values():
        for name, value in values.items():
            if type(value) is Tensor and value.device.type == "cpu":
                values[name] = value.clone()


def check_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], steps: int, skipped: bool
) -> None:
    """Raises ValueError unless `saved` is state of these parameters by this kind of optimizer.

    steps: taken so far. skipped: whether all of them may have been skipped, as the loss scaler of
    float16 does; then there may be no state.
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
        own = optimizer.state.get(parameter) or _expected_state(parameter, group)
        found = dict(states[number])
        if isinstance(packed := found.get(_BITSANDBYTES), dict):
            found = {**found, **packed}
            del found[_BITSANDBYTES]
        _check_state(f"optimizer.state.{number}", own, found, steps)


def _check_state(place: str, own: dict[str, Any], found: dict[str, Any], steps: int) -> None:
    """Raises ValueError unless `found` has the names, shapes and kinds of `own`."""
    for name in sorted({*own, *found}):
        if name not in own or name not in found:
            problem = "not known here" if name not in own else "missing"
            raise ValueError(f"{place}.{name} is {problem}")
        value = found[name]
        if not _same_kind(own[name], value):
            raise ValueError(f"{place}.{name} is {_kind(value)}, expected {_kind(own[name])}")
        if name == "step" and not 0 <= float(value) <= steps:
            raise ValueError(f"{place}.{name} is {float(value)}, of {steps} steps")


def _expected_state(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors of the shapes and dtypes that Muon or torch's AdamW makes in its first step.
    The other optimizers have their state from the start."""
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


class StateSize(NamedTuple):
    """How much memory low-bit moments take."""

    low_bit_bytes: int
    low_bit_parameters: int
    other_parameters: int
    """Those whose state is not in few bits."""


def low_bit_state_size(optimizer: torch.optim.Optimizer) -> StateSize:
    """Returns the size of 4-bit or 8-bit state, counted from storages, each of them once."""
    storages: dict[int, int] = {}
    low = others = 0
    for parameter, state in optimizer.state.items():
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        if any(tensor.dtype == torch.uint8 for tensor in tensors):
            low += parameter.numel()
            # bitsandbytes shares the tables of its levels between parameters.
            whole = (tensor.untyped_storage() for tensor in tensors)
            storages |= {storage._cdata: storage.nbytes() for storage in whole}
        else:
            others += parameter.numel()
    return StateSize(sum(storages.values()), low, others)


def optimizer_lines(optimizer: torch.optim.Optimizer) -> list[str]:
    """Returns a line with the size of 4-bit or 8-bit moments; none for other optimizers."""
    bits = {"AdamW4bit": 4, "AdamW8bit": 8}.get(type(optimizer).__name__)
    if bits is None:
        return []
    size, low, others = low_bit_state_size(optimizer)
    if not low:
        return [f"AdamW with {bits}-bit moments: none, {others:,} parameters are in small tensors"]
    return [
        f"AdamW with {bits}-bit moments: {size / low:.3f} bytes for each of {low:,} parameters; "
        f"{others:,} in float32"
    ]


def gradient_norm(model: nn.Module) -> Tensor:
    """Returns the norm () of all gradients together."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return full_tensor(nn.utils.get_total_norm(gradients))


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scales gradients whose `gradient_norm` is `norm` down to the norm `limit`."""
    nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
