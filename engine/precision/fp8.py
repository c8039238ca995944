"""FP8 training: which backend, which products of the model it covers, and proof that they are made.

Two backends compute the products of activations with weights, forward and backward, in 8-bit
floats. `native` (plain torch, engine/precision/fp8_native.py) covers the tiles of BDH and every
linear layer; `transformer_engine` has recipes with scales for blocks besides. Embeddings, the
head, norms and attention keep the dtype of autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from config import FP8_MULTIPLE, ConfigError, Fp8Config
from engine.precision.fp8_native import (
    E4M3,
    E5M2,
    DelayedScales,
    Made,
    NativeMatmul,
    scaled_product,
)
from model.interface import LanguageModel
from model.matmul import OperandId

ITS_RECIPES = ("block", "mxfp8")  # Transformer Engine's alone
CAPABLE = (8, 9)  # compute capability of the first GPUs with 8-bit products


class Fp8Backend(Protocol):
    """How a model's products are computed; made by binding it to the model."""

    summary: str
    """Such as "native, current scaling"."""
    covered: list[str]
    """Names of the weights whose products are computed in 8 bits."""
    compiles: bool
    """Whether the model can be compiled around the products."""

    @property
    def calls(self) -> int:
        """8-bit products made so far; of Transformer Engine, calls of its modules."""

    def autocast(self) -> AbstractContextManager[None]:
        """Around every forward pass."""

    def training(self) -> AbstractContextManager[None]:
        """Around the passes of a step, whose maxima count for later scales."""

    def end_step(self, maximum: Callable[[Tensor], Tensor]) -> None:
        """After the optimizer's step; `maximum` is over all processes, in place."""

    def metrics(self) -> dict[str, float]:
        """What has been measured since the last call."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and values; empty where scales have no past."""

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Whether the state fits and was taken over."""


def check_device(fp8: Fp8Config, device: torch.device) -> None:
    """Raises ConfigError where `device` cannot multiply 8-bit floats as asked."""
    if fp8.backend == "transformer_engine" or fp8.recipe in ITS_RECIPES:
        from engine.precision.fp8_te import checked_library

        checked_library(fp8, device)
    switch, off = "low_precision.use_fp8=true", "Set low_precision.use_fp8: false."
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{switch}: {device} has no products of 8-bit floats. {off}")
    if device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABLE:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, CAPABLE))
        raise ConfigError(
            f"{switch}: needs compute capability {needed} or newer (Ada, Hopper, Blackwell); "
            f"{device} ({name}) has {capability[0]}.{capability[1]}. {off}"
        )


def bind(
    fp8: Fp8Config, model: LanguageModel, device: torch.device, dtype: torch.dtype
) -> Fp8Backend:
    """Has the products of the model computed in 8 bits; dtype: of what they give.

    `backend: auto` takes Transformer Engine for its own recipes, and for models of linear layers
    where it is installed; else plain torch. Raises ConfigError.
    """
    backend = fp8.backend
    if backend == "auto":
        needed = fp8.recipe in ITS_RECIPES
        layers = device.type == "cuda" and model.matmul_backend is None
        found = find_spec("transformer_engine") is not None
        backend = "transformer_engine" if needed or (layers and found) else "native"
    if backend == "transformer_engine":
        from engine.precision.fp8_te import TransformerEngineBackend

        return cast(Fp8Backend, TransformerEngineBackend(fp8, device, model))
    return NativeBackend(fp8, model, device, dtype)


def check_sides(name: str, sides: tuple[int, ...]) -> None:
    """Raises ConfigError where a weight's sides are no multiples of what 8-bit products take."""
    if any(side % FP8_MULTIPLE for side in sides):
        raise ConfigError(
            f"low_precision.use_fp8=true: {name} is {' x '.join(map(str, sides))}, and 8-bit "
            f"products take multiples of {FP8_MULTIPLE}. Change the widths under model, or set "
            "low_precision.use_fp8: false."
        )


class NativeBackend:
    """Plain torch: BDH by its tiles, other models by their linear layers."""

    def __init__(
        self, fp8: Fp8Config, model: LanguageModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        backward = E5M2 if fp8.format == "hybrid" else E4M3
        self.summary = f"native, {fp8.recipe} scaling"
        self.covered: list[str] = []
        self._began = Made.count
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for weight, _ in model.hidden_weights():
            check_sides(names[id(weight)], tuple(weight.shape[-2:]))
            self.covered.append(names[id(weight)])
        operands = model.matmul_operands().items()
        kinds = {operand: backward if is_gradient else E4M3 for operand, is_gradient in operands}
        self.scales = DelayedScales(fp8, kinds, device) if fp8.recipe == "delayed" else None
        self.matmul = NativeMatmul((E4M3, backward, dtype), self.scales)
        # Models with fused layers compile what is between products, not the products.
        self.compiles = model.matmul_backend is not None or self.scales is None
        if model.matmul_backend is not None:
            model.matmul_backend = self.matmul
        for name, linear in model.hidden_linears().items():
            linear.linear_fn = Fp8Linear(self.matmul, f"{name}.weight")

    @property
    def calls(self) -> int:
        return Made.count - self._began

    def autocast(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.matmul.recording = self.scales is not None
        try:
            yield
        finally:
            self.matmul.recording = False

    def end_step(self, maximum: Callable[[Tensor], Tensor]) -> None:
        if self.scales is not None:
            self.scales.advance(maximum)

    def metrics(self) -> dict[str, float]:
        clipped = None if self.scales is None else self.scales.take_clipped()
        return {} if clipped is None else {"train/fp8_clipped": clipped}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scales is None else self.scales.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        return self.scales is None or (bool(state) and self.scales.load_state_dict(state))


class Fp8Linear:
    """x W^T + b in 8 bits, in place of `torch.nn.functional.linear`."""

    def __init__(self, matmul: NativeMatmul, name: str) -> None:
        self.matmul = matmul
        self.operands = tuple(OperandId(f"{name}.{operand}", 0) for operand in "xwg")

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
        y: Tensor = _Linear.apply(x.flatten(0, -2), weight, self)  # type: ignore[no-untyped-call]
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)

    def cast(self, x: Tensor, operand: int) -> tuple[Tensor, Tensor]:
        """A matrix in 8 bits, and its inverse scale (); operand: x, weight or gradient."""
        matmul = self.matmul
        dtype = matmul.gradient_dtype if operand == 2 else matmul.forward_dtype
        made = matmul.cast(x.unsqueeze(0), self.operands[operand], dtype)
        return made.rows.squeeze(0), made.scale[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: Fp8Linear) -> Tensor:
        x8, x_scale = linear.cast(x, 0)
        w8, w_scale = linear.cast(weight, 1)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.linear, ctx.dtypes = linear, (x.dtype, weight.dtype)
        y: Tensor = scaled_product(x8, w8, [x_scale, w_scale], True, linear.matmul.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = ctx.linear.cast(gradients[0], 2)
        w_t, x_t, g_t = (part.mT.contiguous() for part in (w8, x8, g8))
        dx = scaled_product(g8, w_t, [g_scale, w_scale], False, ctx.linear.matmul.dtype)
        dw = scaled_product(g_t, x_t, [g_scale, x_scale], False, torch.float32)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1]), None
