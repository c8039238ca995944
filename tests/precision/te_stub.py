"""A stand-in for the part of Transformer Engine 2.20 that is used, on any device.

It finds mistakes in how the project calls Transformer Engine, nothing else: nothing that passes
with it has run on a GPU. Arguments that are not used are left out of its signatures, so that a new
one is a TypeError here. Shapes are checked as FP8 matmuls require; calling a module twice in one
autocast with delayed scaling, or saving its pickled state, raises. Products are exact unless
`rounding` is set, and then rounded to 8 bits with scales kept as Transformer Engine keeps them.

    stub = te_stub.install(monkeypatch)
    ...
    assert stub.calls == [("Linear", (64, 16), True), ...]     # class, weight, whether in FP8
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
RECIPES = ("Float8CurrentScaling", "DelayedScaling", "Float8BlockScaling", "MXFP8BlockScaling")


class Format(Enum):
    """(forward, backward)"""

    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Recipe:
    kind: str
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"

    @property
    def delayed(self) -> bool:
        return self.kind == "DelayedScaling"

    @property
    def multiple(self) -> int:
        return 32 if self.kind == "MXFP8BlockScaling" else 16


@dataclass
class Stub:
    """The state of the library, and what tests set and read."""

    rounding: bool = False
    unavailable: dict[str, str] = field(default_factory=dict)  # function: reason
    calls: list[tuple[str, tuple[int, ...], bool]] = field(default_factory=list)
    recipe: Recipe | None = None  # within an autocast
    first: bool = False
    called: set[int] = field(default_factory=set)  # modules, in this autocast
    delayed: list[_Module] = field(default_factory=list)

    def update(self, direction: str) -> None:
        """New scales from the amax of all modules, whose histories move on by one."""
        for module in self.delayed:
            scales, recipe = module.fp8_meta[direction], module.fp8_meta["recipe"]
            history, scale = scales.amax_history, scales.scale
            amax = history.amax(0) if recipe.amax_compute_algo == "max" else history[0].clone()
            scale.copy_(torch.where(amax > 0, scales.largest / amax, scale))
            history.copy_(history.roll(-1, 0))
            history[0] = 0


STUB = Stub()


class Scales:
    """What delayed scaling remembers of some tensors."""

    def __init__(self, length: int, tensors: int, largest: float) -> None:
        self.scale = torch.ones(tensors)
        self.amax_history = torch.zeros(length, tensors)
        self.largest = largest


class autocast:  # noqa: N801  # its name
    def __init__(self, enabled: bool = True, recipe: Recipe | None = None) -> None:
        assert isinstance(recipe, Recipe) and enabled
        self.recipe = recipe

    def __enter__(self) -> autocast:
        assert STUB.recipe is None, "autocasts are not nested"
        STUB.first, STUB.called, STUB.recipe = True, set(), self.recipe
        return self

    def __exit__(self, *_error: object) -> None:
        STUB.recipe = None
        if torch.is_grad_enabled():
            STUB.update("scaling_fwd")


class _Module(nn.Module):
    """What Linear and GroupedLinear share."""

    def __init__(self, num_gemms: int, names: list[str], shape: tuple[int, int], **options: Any):
        super().__init__()
        self.fp8 = self.fp8_initialized = False
        self.fp8_meta: dict[str, Any] = {}
        self.gemms, self.weight_names = num_gemms, names
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))

    def get_extra_state(self) -> Tensor:
        raise AssertionError("the pickled state of a module of Transformer Engine is asked for")

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        assert num_gemms == self.gemms
        recipe = STUB.recipe
        self.fp8 = recipe is not None
        if recipe is None:
            self.fp8_initialized = False
        elif not (self.fp8_initialized and self.fp8_meta["recipe"] == recipe):
            self.fp8_meta["recipe"], self.fp8_initialized = recipe, True
            if recipe.delayed and "scaling_fwd" not in self.fp8_meta:
                length, kinds = recipe.amax_history_len, recipe.fp8_format.value
                self.fp8_meta["scaling_fwd"] = Scales(length, 3 * num_gemms, LARGEST[kinds[0]])
                self.fp8_meta["scaling_bwd"] = Scales(length, 2 * num_gemms, LARGEST[kinds[1]])

    def prepare(self, x: Tensor) -> torch.dtype:
        """The dtype of the products; what a module does and checks before each call."""
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        elif any(parameter.dtype != dtype for parameter in self.parameters()):
            raise TypeError("Data types for parameters must match")
        self.init_fp8_metadata(self.gemms)
        if STUB.recipe is not None and STUB.recipe.delayed:
            if id(self) in STUB.called:
                raise RuntimeError("a module is called twice in one autocast with reduce_amax")
            STUB.called.add(id(self))
            if self not in STUB.delayed:
                STUB.delayed.append(self)
        return dtype

    def run(self, x: Tensor, splits: Sequence[int], bias: Tensor | None) -> Tensor:
        dtype = self.prepare(x)
        weights = [getattr(self, name) for name in self.weight_names]
        first, STUB.first = STUB.first, False
        for weight in weights:
            STUB.calls.append((type(self).__name__, tuple(weight.shape), self.fp8))
            if self.fp8:
                check_dims(weight)
        arguments = (self, list(splits), first, dtype, x, bias, *weights)
        result: Tensor = _Products.apply(*arguments)  # type: ignore[no-untyped-call]  # torch
        return result

    def quantized(self, x: Tensor, slot: int, backward: bool = False) -> Tensor:
        """x rounded to 8 bits where the stub rounds; delayed scaling notes its amax anyway."""
        if not self.fp8:
            return x
        amax = x.detach().abs().amax().float()
        recipe = self.fp8_meta["recipe"]
        kind = recipe.fp8_format.value[backward]
        scale = torch.where(amax > 0, LARGEST[kind] / amax, torch.ones_like(amax))
        if recipe.delayed:
            scales = self.fp8_meta["scaling_bwd" if backward else "scaling_fwd"]
            row = scales.amax_history[0]
            row[slot] = torch.maximum(row[slot], amax)
            scale = scales.scale[slot]
        if not STUB.rounding:
            return x
        scaled = (x.float() * scale).clamp(-LARGEST[kind], LARGEST[kind])
        return (scaled.to(kind).float() / scale).to(x.dtype)


class _Products(torch.autograd.Function):
    """One product, or one per group of rows."""

    @staticmethod
    def forward(ctx: Any, module: _Module, splits: list[int], *rest: Any) -> Tensor:
        first, dtype, x, bias, *weights = rest
        groups = []
        rows = x.reshape(-1, x.shape[-1]).split(splits)
        for i, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            row, weight = module.quantized(row, 3 * i), module.quantized(weight, 3 * i + 1)
            groups.append((row.to(dtype), weight.to(dtype)))
        ctx.save_for_backward(*(tensor for group in groups for tensor in group))
        ctx.module, ctx.splits, ctx.first, ctx.shape = module, splits, first, x.shape
        ctx.has_bias = bias is not None
        with torch.autocast(x.device.type, enabled=False):
            y = torch.cat([row @ weight.mT for row, weight in groups])
        y = y if bias is None else y + bias.to(dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g, saved, dx, dw = gradients[0].flatten(0, -2), ctx.saved_tensors, [], []
        for i, part in enumerate(torch.split(g, ctx.splits)):
            part = ctx.module.quantized(part, 2 * i, backward=True)
            dx.append(part @ saved[2 * i + 1])
            dw.append(part.mT @ saved[2 * i])
        if ctx.first and "scaling_bwd" in ctx.module.fp8_meta:
            STUB.update("scaling_bwd")
        bias = g.sum(0) if ctx.has_bias else None
        return None, None, None, None, torch.cat(dx).view(ctx.shape), bias, *dw


def check_dims(tensor: Tensor) -> None:
    """The rule for what is multiplied in FP8, a little stricter: matrices are weights."""
    assert STUB.recipe is not None
    rows, least = math.prod(tensor.shape[:-1]), STUB.recipe.multiple
    if rows % (least if tensor.dim() == 2 else 8) or tensor.shape[-1] % least:
        raise ValueError(f"FP8 execution requires other dimensions than {list(tensor.shape)}")


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": params_dtype}
        super().__init__(1, ["weight"], (out_features, in_features), **options)
        self.use_bias = bias
        self.bias = nn.Parameter(torch.empty(out_features, **options)) if bias else torch.Tensor()

    def forward(self, inp: Tensor) -> Tensor:
        if STUB.recipe is not None:
            check_dims(inp)
        rows = inp.numel() // inp.shape[-1]
        return self.run(inp, [rows], self.bias if self.use_bias else None)


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        names = [f"weight{i}" for i in range(num_gemms)]
        shape, options = (out_features, in_features), {"device": device, "dtype": params_dtype}
        super().__init__(num_gemms, names, shape, **options)
        assert not bias, "the stub has no biases of groups"
        self.num_gemms = num_gemms

    def forward(self, inp: Tensor, m_splits: Tensor) -> Tensor:
        assert m_splits.dtype == torch.int64 and m_splits.device.type == "cpu"
        if m_splits.shape != (self.num_gemms,) or int(m_splits.sum()) != len(inp):
            raise ValueError("Shape of splits tensor does not match number of GEMMs")
        if STUB.recipe is not None and any(m_splits % STUB.recipe.multiple):
            raise ValueError(f"splits {m_splits.tolist()} are not aligned")
        return self.run(inp, m_splits.tolist(), None)


def _available(name: str) -> Callable[..., Any]:
    def available(return_reason: bool = False) -> Any:
        reason = STUB.unavailable.get(name, "")
        return (not reason, reason) if return_reason else not reason

    return available


def _recipe(kind: str) -> Callable[..., Recipe]:
    return lambda **options: Recipe(kind, **options)


def install(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Puts the stub where `import transformer_engine` finds it, with a state that is new."""
    STUB.__init__()  # type: ignore[misc]  # afresh
    root = "transformer_engine"
    names = (root, f"{root}.common", f"{root}.common.recipe", f"{root}.pytorch")
    package, common, recipe, te = (ModuleType(name) for name in names)
    vars(recipe).update({kind: _recipe(kind) for kind in RECIPES}, Format=Format)
    checks = ("is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available")
    vars(te).update({name: _available(name) for name in checks})
    vars(te).update(autocast=autocast, Linear=Linear, GroupedLinear=GroupedLinear)
    vars(package).update(common=common, pytorch=te, __path__=[])
    vars(common).update(recipe=recipe, __path__=[])
    for module in (package, common, recipe, te):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Stub 100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return STUB
