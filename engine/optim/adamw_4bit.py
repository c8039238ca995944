"""AdamW whose two moments take 1.016 bytes per parameter together, instead of 8.

Matrices of at least 4096 numbers keep both moments in 4 bits (quantized_moments.py). Everything
else, norms and biases, is torch's AdamW bit for bit. Only what is kept between steps is rounded: a
step is computed in float32, chunk by chunk, so that it takes 15 MB on a CPU, and half a gigabyte on
CUDA, for a tensor of any size.

It saves memory, not time: a CPU takes 23 ns per parameter and step, torch's fused AdamW 1 ns.

Source: Li et al., "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507, with other
levels: theirs make steps too short where gradients are sparse, as BDH's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.optim.adamw import adamw_state, adamw_step
from engine.optim.quantized_moments import (
    NOISE_SPAN,
    Quantized4bit,
    decode_u,
    decode_v,
    encode_u,
    encode_v,
)

MIN_NUMEL = 4096  # numbers; smaller tensors are too few bytes to matter
# Numbers of a tensor that are updated at a time. Any multiple of NOISE_SPAN gives equal results: a
# CPU's caches want small chunks, and a GPU large ones, since a chunk is about 130 kernels.
CHUNK, CUDA_CHUNK = NOISE_SPAN, 32 * NOISE_SPAN  # 2 ** 19, 2 ** 24
SMALLEST_ROOT = 1e-18  # of v; squares of smaller gradients are subnormal in float32, or zero


class AdamW4bit(torch.optim.Optimizer):
    """AdamW with 4-bit moments. State exists from the start, as plain tensors and ints.

    Stochastic rounding depends on the parameter's index, its step and the position in it alone: it
    is the same in a resumed run and in every process.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "betas": betas, "eps": eps}
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, and makes the state of its parameters."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = _initial_state(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient; takes no closure."""
        assert closure is None
        for index, (parameter, group) in enumerate(self._parameters()):
            if is_quantizable(parameter) and parameter.grad is not None:
                self._update_quantized(parameter, group, index)
        for group in self.param_groups:
            others = [p for p in group["params"] if not is_quantizable(p)]
            adamw_step(others, self.state, group)

    def _parameters(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"])

    def _update_quantized(self, parameter: nn.Parameter, group: dict[str, Any], index: int) -> None:
        """Updates a parameter whose moments are in 4 bits; index: among all parameters."""
        assert parameter.grad is not None
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["step"] += 1
        weights, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        chunk = chunk_size(parameter.device)
        for start in range(0, len(weights), chunk):
            stop = min(start + chunk, len(weights))
            u, v = (_quantized(state, moment).part(start, stop) for moment in "uv")
            square = decode_v(v, stop - start)
            m = decode_u(u, stop - start).mul_(square.sqrt())
            g = gradient[start:stop].float()
            m.lerp_(g, 1 - beta1)
            square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            _move(weights[start:stop], m, square, group, state["step"])
            u.write(encode_u(m.div_(square.sqrt().clamp_(min=SMALLEST_ROOT))))
            v.write(encode_v(square, (index, state["step"], start)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies saved state; raises ValueError for that of other parameters or optimizers."""
        own = dict(self.state)
        # Given the state, torch's method would convert codes to the parameter's float dtype.
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(own)
        for index, (parameter, _) in enumerate(self._parameters()):
            _restore(self.state[parameter], state_dict["state"].get(index, {}), index)


def chunk_size(device: torch.device) -> int:
    """Returns how many numbers of a tensor are updated at a time."""
    return CUDA_CHUNK if device.type == "cuda" else CHUNK


def is_quantizable(parameter: Tensor) -> bool:
    """Returns whether the moments of this parameter are kept in 4 bits."""
    return parameter.dim() >= 2 and parameter.numel() >= MIN_NUMEL and parameter.is_contiguous()


def _initial_state(parameter: nn.Parameter) -> dict[str, Any]:
    if not is_quantizable(parameter):
        return adamw_state(parameter)
    state: dict[str, Any] = {"step": 0}
    for moment in "uv":
        zeros = Quantized4bit.zeros(parameter.numel(), parameter.device)
        state |= {f"{moment}_{name}": tensor for name, tensor in zeros._asdict().items()}
    return state


def _quantized(state: dict[str, Any], moment: str) -> Quantized4bit:
    return Quantized4bit(*(state[f"{moment}_{name}"] for name in Quantized4bit._fields))


def _move(weights: Tensor, m: Tensor, v: Tensor, group: dict[str, Any], step: int) -> None:
    """Applies AdamW's update to weights (n,), in float32 whatever their dtype."""
    beta1, beta2 = group["betas"]
    divisor = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    # float() does not copy float32 weights: these are updated in place.
    moved = weights.float().mul_(1 - group["lr"] * group["weight_decay"])
    moved.addcdiv_(m, divisor, value=-group["lr"] / (1 - beta1**step))
    if moved.dtype != weights.dtype:
        weights.copy_(moved)


def _restore(own: dict[str, Any], saved: dict[str, Any], index: int) -> None:
    """Copies the saved state of the `index`th parameter into its own."""
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
