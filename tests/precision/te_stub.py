"""A stand-in for Transformer Engine 2.20: its signatures and its rules, on any device.

It is there to find mistakes in how the project calls Transformer Engine, nothing else: nothing that
passes with it has run on a GPU. An unknown keyword is a TypeError, as are wrong dtypes; shapes are
checked as FP8 products ask for; calling a module twice in one autocast with delayed scaling, or
saving its pickled state, raises. Products are exact unless `rounding` is set, and then rounded to 8
bits with scales that are kept as Transformer Engine keeps them.

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


class Format(Enum):
    """(forward, backward)"""

    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)
    E5M2 = (torch.float8_e5m2, torch.float8_e5m2)


@dataclass
class Recipe:
    pass


@dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    scaling_factor_compute_algo: Callable[..., Tensor] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass
class Float8CurrentScaling(Recipe):
    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: Any = None
    fp8_gemm_dgrad: Any = None
    fp8_gemm_wgrad: Any = None
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass
class MXFP8BlockScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None
    enable_2d_quantization: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: Any = None
    fp8_gemm_dgrad: Any = None
    fp8_gemm_wgrad: Any = None
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass
class Stub:
    """The state of the library, and what tests set and read."""

    rounding: bool = False
    unavailable: dict[str, str] = field(default_factory=dict)  # function: reason
    calls: list[tuple[str, tuple[int, ...], bool]] = field(default_factory=list)
    recipes: list[Recipe] = field(default_factory=list)  # of every autocast
    enabled: bool = False
    recipe: Recipe | None = None
    depth: int = 0
    first: bool = False
    called: set[int] = field(default_factory=set)  # in this autocast
    delayed: list[_Module] = field(default_factory=list)

    def update(self, direction: str) -> None:
        """New scales from the maxima of all modules, whose histories move on by one."""
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

    def see(self, index: int, amax: Tensor) -> None:
        row = self.amax_history[0]
        row[index] = torch.maximum(row[index], amax)


class autocast:  # noqa: N801  # its name
    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Recipe | None = None,
        amax_reduction_group: Any = None,
        _graph: bool = False,
    ) -> None:
        assert isinstance(recipe, Recipe) and not calibrating and not _graph
        self.enabled, self.recipe = enabled, recipe

    def __enter__(self) -> autocast:
        if STUB.depth == 0:
            STUB.first, STUB.called = True, set()
        STUB.recipes.append(self.recipe)
        self.before = (STUB.enabled, STUB.recipe)
        STUB.enabled, STUB.recipe = self.enabled, self.recipe
        STUB.depth += 1
        return self

    def __exit__(self, *_error: object) -> None:
        STUB.enabled, STUB.recipe = self.before
        STUB.depth -= 1
        if self.enabled and STUB.depth == 0 and torch.is_grad_enabled():
            STUB.update("scaling_fwd")


class _Module(nn.Module):
    """What Linear and GroupedLinear share."""

    weight_names: list[str]

    def __init__(self, name: str | None, num_gemms: int) -> None:
        super().__init__()
        self.fp8 = self.fp8_initialized = False
        self.fp8_meta: dict[str, Any] = {}
        self.gemms = num_gemms

    def get_extra_state(self) -> Tensor:
        raise AssertionError("the pickled state of a module of Transformer Engine is asked for")

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("the pickled state of a module of Transformer Engine is loaded")

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        assert num_gemms == self.gemms
        self.fp8 = STUB.enabled
        if not STUB.enabled:
            self.fp8_initialized = False
        elif not (self.fp8_initialized and self.fp8_meta["recipe"] == STUB.recipe):
            self.fp8_meta["recipe"], self.fp8_initialized = STUB.recipe, True
            if isinstance(STUB.recipe, DelayedScaling) and "scaling_fwd" not in self.fp8_meta:
                length, kinds = STUB.recipe.amax_history_len, STUB.recipe.fp8_format.value
                self.fp8_meta["scaling_fwd"] = Scales(length, 3 * num_gemms, LARGEST[kinds[0]])
                self.fp8_meta["scaling_bwd"] = Scales(length, 2 * num_gemms, LARGEST[kinds[1]])

    def prepare(self, x: Tensor) -> torch.dtype:
        """The dtype of the products; what a module does and checks before each call."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        else:
            dtype = x.dtype
            for parameter in self.parameters():
                if parameter.dtype != dtype:
                    raise TypeError("Data types for parameters must match")
        self.init_fp8_metadata(self.gemms)
        if self.fp8 and isinstance(STUB.recipe, DelayedScaling):
            if STUB.recipe.reduce_amax and id(self) in STUB.called:
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
        """x rounded to 8 bits where the stub rounds; delayed scaling notes its maximum anyway."""
        if not self.fp8:
            return x
        amax = x.detach().abs().amax().float()
        assert STUB.recipe is not None or backward
        recipe = self.fp8_meta["recipe"]
        kind = recipe.fp8_format.value[backward]
        scale = torch.where(amax > 0, LARGEST[kind] / amax, torch.ones_like(amax))
        if isinstance(recipe, DelayedScaling):
            scales = self.fp8_meta["scaling_bwd" if backward else "scaling_fwd"]
            scales.see(slot, amax)
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
        rows = x.reshape(-1, x.shape[-1]).split(splits)
        groups = []
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
    rows = math.prod(tensor.shape[:-1])
    least = 32 if isinstance(STUB.recipe, MXFP8BlockScaling) else 16
    if rows % (least if tensor.dim() == 2 else 8) or tensor.shape[-1] % least:
        raise ValueError(f"FP8 execution requires other dimensions than {list(tensor.shape)}")


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name, 1)
        options: dict[str, Any] = {"device": device, "dtype": params_dtype}
        self.weight_names, self.use_bias = ["weight"], bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.bias = nn.Parameter(torch.empty(out_features, **options)) if bias else torch.Tensor()

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        if STUB.enabled:
            check_dims(inp)
        rows = inp.numel() // inp.shape[-1]
        return self.run(inp, [rows], self.bias if self.use_bias else None)


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        name: str | None = None,
        use_grouped_tensor: bool | None = None,
    ) -> None:
        super().__init__(name, num_gemms)
        assert not bias, "the stub has no biases of groups"
        self.num_gemms = num_gemms
        self.weight_names = [f"weight{i}" for i in range(num_gemms)]
        for each in self.weight_names:
            shape = (out_features, in_features)
            empty = torch.empty(shape, device=device, dtype=params_dtype)
            self.register_parameter(each, nn.Parameter(empty))

    def forward(
        self,
        inp: Tensor,
        m_splits: Tensor,
        is_first_microbatch: bool | None = None,
        out: Tensor | None = None,
        dgrad_out: Tensor | None = None,
    ) -> Tensor:
        assert m_splits.dtype == torch.int64 and m_splits.device.type == "cpu"
        if m_splits.shape != (self.num_gemms,) or int(m_splits.sum()) != len(inp):
            raise ValueError("Shape of splits tensor does not match number of GEMMs")
        least = 32 if isinstance(STUB.recipe, MXFP8BlockScaling) else 16
        if STUB.enabled and any(m_splits % least):
            raise ValueError(f"splits {m_splits.tolist()} are not aligned to {least}")
        return self.run(inp, m_splits.tolist(), None)


def _asked(name: str) -> Callable[..., Any]:
    def available(return_reason: bool = False) -> Any:
        reason = STUB.unavailable.get(name, "")
        return (not reason, reason) if return_reason else not reason

    return available


def install(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Puts the stub where `import transformer_engine` finds it, with a state that is new."""
    STUB.__init__()  # type: ignore[misc]  # afresh
    package, common = ModuleType("transformer_engine"), ModuleType("transformer_engine.common")
    recipe = ModuleType("transformer_engine.common.recipe")
    te = ModuleType("transformer_engine.pytorch")
    recipe.__dict__.update(
        {c.__name__: c for c in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling)},
        MXFP8BlockScaling=MXFP8BlockScaling,
        Format=Format,
    )
    names = ("is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available")
    te.__dict__.update({name: _asked(name) for name in names})
    te.__dict__.update(autocast=autocast, Linear=Linear, GroupedLinear=GroupedLinear)
    package.__dict__.update(common=common, pytorch=te, __path__=[])
    common.__dict__.update(recipe=recipe, __path__=[])
    for module in (package, common, recipe, te):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Stub 100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return STUB
