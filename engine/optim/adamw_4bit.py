"""AdamW whose two moments take 1.016 bytes per parameter together, in place of 8.

Matrices of at least 4096 numbers keep both moments in 4 bits (quantized_moments.py). The rest,
norms and biases, is torch's AdamW bit for bit. Only what is kept between steps is rounded: a step
itself is computed in float32, in pieces of a tensor, so that it takes 40 MB whatever its size.

It saves memory, not time: a CPU takes 23 ns per parameter and step, 1 with torch's fused AdamW.

Source: Li et al., "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507, with other
codes: theirs take steps too short where gradients are sparse, as BDH's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.optim.adamw import adamw_state, adamw_step
from engine.optim.quantized_moments import (
    SUPERBLOCK,
    Quantized4bit,
    decode_u,
    decode_v,
    encode_u,
    encode_v,
    zeros,
)

MIN_NUMEL = 4096  # numbers; smaller tensors are too few bytes to matter
CHUNK = 16 * SUPERBLOCK  # numbers of a tensor that are stepped at a time: 524,288
SMALLEST_ROOT = 1e-18  # of v; squares of smaller gradients are subnormal in float32, or zero


class AdamW4bit(torch.optim.Optimizer):
    """State exists from the start, as plain tensors and ints.

    Chance in rounding follows from a parameter's place among the others, its step and the number's
    place in it: it is the same in a resumed run and in every process.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "betas": betas, "eps": eps}
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the state of the new parameters."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = _new_state(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient; takes no closure."""
        assert closure is None
        for index, (parameter, group) in enumerate(self._parameters()):
            if is_quantizable(parameter) and parameter.grad is not None:
                self._step(parameter, group, index)
        for group in self.param_groups:
            others = [p for p in group["params"] if not is_quantizable(p)]
            adamw_step(others, self.state, group)

    def _parameters(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"])

    def _step(self, parameter: nn.Parameter, group: dict[str, Any], index: int) -> None:
        """A step of the `index`th parameter, which is in 4 bits."""
        assert parameter.grad is not None
        state = self.state[parameter]
        state["step"] += 1
        weights, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        for start in range(0, len(weights), CHUNK):
            stop = min(start + CHUNK, len(weights))
            u, v = (_rounded(state, moment).part(start, stop) for moment in "uv")
            square = decode_v(v, stop - start)
            m = decode_u(u, stop - start).mul_(square.sqrt())
            g = gradient[start:stop].float()
            m.lerp_(g, 1 - group["betas"][0])
            square.mul_(group["betas"][1]).addcmul_(g, g, value=1 - group["betas"][1])
            _move(weights[start:stop], m, square, group, state["step"])
            u.write(encode_u(m.div_(square.sqrt().clamp_(min=SMALLEST_ROOT))))
            v.write(encode_v(square, (index, state["step"], start)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies saved state; ValueError where it is of other parameters or another optimizer."""
        own = dict(self.state)
        # torch's own way would turn codes into floating numbers of the parameter's dtype.
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(own)
        for index, (parameter, _) in enumerate(self._parameters()):
            _restore(self.state[parameter], state_dict["state"].get(index, {}), index)


def is_quantizable(parameter: Tensor) -> bool:
    """Whether the moments of this parameter are kept in 4 bits."""
    return parameter.dim() >= 2 and parameter.numel() >= MIN_NUMEL and parameter.is_contiguous()


def _new_state(parameter: nn.Parameter) -> dict[str, Any]:
    if not is_quantizable(parameter):
        return adamw_state(parameter)
    state: dict[str, Any] = {"step": 0}
    for moment in "uv":
        for name, tensor in zeros(parameter.numel(), parameter.device)._asdict().items():
            state[f"{moment}_{name}"] = tensor
    return state


def _rounded(state: dict[str, Any], moment: str) -> Quantized4bit:
    return Quantized4bit(*(state[f"{moment}_{name}"] for name in Quantized4bit._fields))


def _move(weights: Tensor, m: Tensor, v: Tensor, group: dict[str, Any], step: int) -> None:
    """AdamW's step of weights (n,), in float32 whatever their dtype."""
    beta1, beta2 = group["betas"]
    divisor = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    moved = weights.float().mul_(1 - group["lr"] * group["weight_decay"])
    moved.addcdiv_(m, divisor, value=-group["lr"] / (1 - beta1**step))
    if moved.dtype != weights.dtype:  # else it is the same memory
        weights.copy_(moved)


def _restore(own: dict[str, Any], saved: dict[str, Any], index: int) -> None:
    """Copies what was saved of the `index`th parameter into its state."""
    for name, value in own.items():
        found = saved.get(name)
        if isinstance(value, Tensor) and isinstance(found, Tensor):
            if found.shape == value.shape and found.dtype == value.dtype:
                value.copy_(found)
                continue
        elif isinstance(value, int) and isinstance(found, int):
            own[name] = found
            continue
        raise ValueError(f"saved state of parameter {index} has no {name} that fits it")
