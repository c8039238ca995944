"""FP8 in plain torch: products with weights from 8-bit operands, on CUDA by `torch._scaled_mm`.

An 8-bit float has three bits of mantissa (e4m3), or two and a wider range (e5m2, for gradients
under `hybrid`). Its range is far smaller than that of bfloat16: without a scale, gradients would
become zero and large activations would be clipped. So each operand is multiplied by a scale that
brings its largest absolute value (amax) to the end of the range, cast, and the product divided by
both scales. Two ways to find the scale:

    current   from the operand itself, for each head and tile its own: reads the operand twice
    delayed   from the operand's amax in earlier steps, so that one pass over it is enough; larger
              numbers than then are clipped, and how often is measured

A CPU multiplies the same 8-bit operands as float32, which is how this is tested.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433; NVIDIA's
Transformer Engine for the recipes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import FP8_MULTIPLE, Fp8Config
from engine.precision.fp8_backend import Fp8Backend
from model import LanguageModel
from model.compiled import compile_shapes
from model.matmul import Accumulator, OperandId

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-100  # a smaller amax would make the scale infinite


def multiply(
    left: Tensor, right: Tensor, scales: Sequence[Tensor], fast: bool, out: Tensor
) -> Tensor:
    """Writes left (M, K) @ right (N, K)^T, times both scales, to `out`.

    Operands are 8-bit and row-major, as `_scaled_mm` needs them. fast: sums are accumulated with
    fewer bits.
    """
    if left.device.type == "cpu":
        # `_scaled_mm` takes seconds on CPUs with AMX. float32 holds every 8-bit float and most sums
        # of their products, so the result hardly depends on the CPU; it is rounded once. Scales
        # come last: as `alpha` of the product a scale that is NaN would be lost.
        product = left.float() @ right.float().mT
        return out.copy_(product.mul_(scales[0] * scales[1]))
    # K is tokens for the gradient of a weight. A micro-batch has a multiple of 16, but BDH may take
    # its sequences in groups, which need not.
    missing = -left.shape[1] % FP8_MULTIPLE
    if missing:
        left, right = (
            F.pad(part.view(torch.uint8), (0, missing)).view(part.dtype) for part in (left, right)
        )
    return torch._scaled_mm(
        left, right.mT, scales[0], scales[1], out_dtype=out.dtype, use_fast_accum=fast, out=out
    )


@torch.library.custom_op("hatchery::scaled_matmul", mutates_args=("count",))
def scaled_matmul(
    left: Tensor,
    right: Tensor,
    scales: Sequence[Tensor],
    fast: bool,
    dtype: torch.dtype,
    count: Tensor,
) -> Tensor:
    """Returns `multiply(left, right, scales, fast)` in `dtype`, and adds 1 to `count` ().

    It is an operator, so that compilers neither look inside nor drop the count: an attribute of a
    Python object would be counted once, when the graph is traced.
    """
    count.add_(1)
    out = left.new_empty(left.shape[0], right.shape[0], dtype=dtype)
    return multiply(left, right, scales, fast, out)


@scaled_matmul.register_fake
def _(left: Tensor, right: Tensor, scales: Any, fast: Any, dtype: torch.dtype, _: Any) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0], dtype=dtype)


class Fp8Operand:
    """Matrices in 8 bits: `rows` (g, M, K), `columns` (g, K, M), and inverse scales (g,)."""

    def __init__(self, rows: Tensor, scale: Tensor, columns: Tensor | None = None) -> None:
        self.rows, self.scale, self._columns = rows, scale, columns

    @property
    def columns(self) -> Tensor:
        """The transpose, row-major; copied once for all products that need it."""
        if self._columns is None:
            self._columns = self.rows.mT.contiguous()
        return self._columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, heads: slice) -> Fp8Operand:
        return Fp8Operand(self.rows[heads], self.scale[heads], self.columns[heads])


def largest(dtype: torch.dtype) -> float:
    """Returns the largest number of an 8-bit format."""
    return torch.finfo(dtype).max


def cast_with_own_amax(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Casts x (g, M, K) with a scale per matrix; returns it, inverse scales and amax, (g,) each."""
    amax = x.abs().amax((1, 2)).float()
    scale, inverse = _scale_for(amax, dtype)
    return _scaled(x, scale, dtype), inverse, amax


def _scale_for(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = largest(dtype) / amax.clamp(min=SMALLEST)
    return scale, scale.reciprocal()


def cast_with_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts x (g, M, K) with a given scale (); returns it and its amax ()."""
    return _scaled(x, scale, dtype), x.abs().amax().float()


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = largest(dtype)  # beyond it a cast to e5m2 gives infinities
    return (x * scale.view(-1, 1, 1)).clamp_(-limit, limit).to(dtype)


_compiled = cache(compile_shapes)


def _has_cast_kernel(x: Tensor) -> bool:
    # In a compiled model the expressions above are better: they are fused with what computes x.
    return x.is_cuda and not torch.compiler.is_compiling() and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _cast_by_kernel(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Fp8Operand, Tensor]:
    """Returns the operand and amax that the two functions above give for a scale () of earlier
    steps or for None, with both layouts."""
    from engine.precision import fp8_cast  # imports Triton, which only computers with CUDA have

    if scale is not None:
        rows, columns, amax = fp8_cast.cast_both_layouts(x, scale, dtype)
        return Fp8Operand(rows, scale.reciprocal(), columns), amax.amax()
    amax = fp8_cast.amax_of(x)
    scale, inverse = _scale_for(amax, dtype)
    rows, columns, _ = fp8_cast.cast_both_layouts(x, scale, dtype)
    return Fp8Operand(rows, inverse, columns), amax


class DelayedScales:
    """A scale for each operand of each layer, from its amax in earlier steps.

    A step with all its micro-steps is one entry of the history. In the first step operands are
    scaled by their own amax; the scale of an operand that has only been zero is 1.
    """

    def __init__(
        self, fp8: Fp8Config, dtypes: dict[OperandId, torch.dtype], device: torch.device
    ) -> None:
        self.index = {operand: number for number, operand in enumerate(dtypes)}
        self.operands = [f"{name}.{layer} {dtype}" for (name, layer), dtype in dtypes.items()]
        self.limits = torch.tensor([largest(dtype) for dtype in dtypes.values()], device=device)
        self.history = torch.zeros(fp8.amax_history_len, len(dtypes), device=device)
        self.scale, self.amax = torch.zeros_like(self.limits), torch.zeros_like(self.limits)
        self.steps = 0
        self.most_recent = fp8.amax_compute_algo == "most_recent"
        self._clipped = torch.zeros((), device=device)  # share of operands, summed over steps
        self._counted = 0

    def scale_of(self, operand: OperandId) -> Tensor | None:
        """Returns the scale () of an operand; None in the first step."""
        return self.scale[self.index[operand]] if self.steps else None

    def record_amax(self, operand: OperandId, amax: Tensor) -> None:
        """Takes amax, of any shape, into that of the operand in this step."""
        # On the device and in place: reading the value would wait for the GPU at every product.
        slot = self.amax[self.index[operand]]
        torch.maximum(slot, amax.max(), out=slot)

    def end_step(self, all_reduce_max: Callable[[Tensor], Tensor]) -> None:
        """Makes the scales of the next step; all processes get the same."""
        amax = all_reduce_max(self.amax)
        if self.steps:
            # 1.0001: the scale is rounded, so that an operand at its limit may seem beyond it.
            self._clipped += (amax * self.scale > self.limits * 1.0001).float().mean()
            self._counted += 1
        self.history[self.steps % len(self.history)] = amax
        self.steps += 1
        past = amax if self.most_recent else self.history.amax(0)
        fresh = self.limits / past.clamp(min=SMALLEST)
        kept = torch.where(self.scale > 0, self.scale, torch.ones_like(fresh))
        self.scale.copy_(torch.where(past > 0, fresh, kept))
        amax.zero_()

    def take_clipped(self) -> float | None:
        """Returns the share of operands whose amax was clipped, since the last call."""
        if not self._counted:
            return None
        share = float(self._clipped) / self._counted
        self._clipped.zero_()
        self._counted = 0
        return share

    def state_dict(self) -> dict[str, Any]:
        """Returns plain tensors and values."""
        return {
            "operands": self.operands,
            "history": self.history,
            "scale": self.scale,
            "steps": self.steps,
            "clipped": self._clipped,
            "counted": self._counted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restores what `state_dict` gave; returns False for that of other operands."""
        if state.get("operands") != self.operands:  # of another model, format or backend
            return False
        if state["history"].shape != self.history.shape:
            return False
        self.history.copy_(state["history"])
        self.scale.copy_(state["scale"])
        self._clipped.copy_(state["clipped"])
        self.steps, self._counted = state["steps"], state["counted"]
        return True


class NativeMatmul:
    """Products with weights in 8 bits: a `model.matmul.MatmulBackend`.

    The inputs of a model's layers and its weights are cast to `forward_dtype`, gradients to
    `gradient_dtype`; results are of `dtype`, those of weight gradients float32.
    """

    compiled = False
    operand_bytes = 12  # on a CPU: a cast in float32, two operands in both layouts, and a product

    def __init__(
        self,
        forward_dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        dtype: torch.dtype,
        scales: DelayedScales | None = None,
    ) -> None:
        self.forward_dtype, self.gradient_dtype, self.dtype = forward_dtype, gradient_dtype, dtype
        self.scales = scales
        self.recording = False  # whether an amax counts for later scales
        self.count = torch.zeros((), dtype=torch.int64)  # matmuls; a tensor for `scaled_matmul`

    def weight(self, value: Tensor, name: str) -> Fp8Operand:
        return self.cast(value, OperandId(name, 0), self.forward_dtype)

    def activation(self, value: Tensor, operand: OperandId, shared: bool = False) -> Fp8Operand:
        return self.cast(value, operand, self.forward_dtype)

    def gradient(self, value: Tensor, operand: OperandId) -> Fp8Operand:
        return self.cast(value, operand, self.gradient_dtype)

    # Only the forward product accumulates fast, as in Transformer Engine: gradients are sums of
    # many small terms, which fewer bits would lose.

    def forward(
        self, x: Fp8Operand, weight: Fp8Operand, out: Tensor | Accumulator | None = None
    ) -> Tensor:
        return self._multiply(x.rows, x.scale, weight.columns, weight.scale, out, fast=True)

    def grad_input(
        self, gradient: Fp8Operand, weight: Fp8Operand, out: Tensor | Accumulator | None = None
    ) -> Tensor:
        return self._multiply(gradient.rows, gradient.scale, weight.rows, weight.scale, out)

    def grad_weight(
        self, x: Fp8Operand, gradient: Fp8Operand, out: Accumulator | None = None
    ) -> Tensor:
        left, right = x.columns, gradient.columns
        shape = (max(len(x), len(gradient)), left.shape[1], right.shape[1])
        result = left.new_empty(shape, dtype=torch.float32) if out is None else out
        return self._multiply(left, x.scale, right, gradient.scale, result)

    def _multiply(
        self,
        left: Tensor,
        left_scale: Tensor,
        right: Tensor,
        right_scale: Tensor,
        out: Tensor | Accumulator | None,
        fast: bool = False,
    ) -> Tensor:
        """Returns left (g, M, K) @ right (g, N, K)^T; an operand with g = 1 serves all heads."""
        g = max(len(left), len(right))
        if isinstance(out, Tensor):
            product = out
        else:
            dtype = self.dtype if out is None else torch.float32
            product = left.new_empty((g, left.shape[1], right.shape[1]), dtype=dtype)
        for head in range(g):
            one, other = head % len(left), head % len(right)
            scales = left_scale[one], right_scale[other]
            multiply(left[one], right[other], scales, fast, product[head])
        self.count.add_(g)
        if out is None or isinstance(out, Tensor):
            return product
        out.add_product(product)
        return out.total

    def cast(self, value: Tensor, operand: OperandId, dtype: torch.dtype) -> Fp8Operand:
        """Casts matrices (g, M, K)."""
        scale = None if self.scales is None else self.scales.scale_of(operand)
        if _has_cast_kernel(value):
            made, amax = _cast_by_kernel(value, scale, dtype)
        elif scale is None:
            expression = _compiled(cast_with_own_amax) if self.compiled else cast_with_own_amax
            rows, inverse, amax = expression(value, dtype)
            made = Fp8Operand(rows.contiguous(), inverse)
        else:
            expression = _compiled(cast_with_scale) if self.compiled else cast_with_scale
            rows, amax = expression(value, scale, dtype)
            made = Fp8Operand(rows.contiguous(), scale.reciprocal())
        if scale is not None:
            # Clipping makes a finite number of an infinity. The product has to be NaN then, so that
            # the step is refused: amax - amax is 0, but NaN for an amax that is not finite.
            made.scale = (made.scale + (amax - amax)).expand(len(value))
        if self.scales is not None and self.recording:
            self.scales.record_amax(operand, amax)
        return made


class Fp8Linear:
    """x W^T + b in 8 bits: the `linear_fn` of a `model.matmul.Linear`."""

    def __init__(self, matmul: NativeMatmul, name: str) -> None:
        """name: of the weight; the operands are those that `matmul_operands` of the model lists."""
        self.matmul = matmul
        self.x, self.w, self.g = (OperandId(f"{name}.{operand}", 0) for operand in "xwg")

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
        y: Tensor = _Fp8Linear.apply(x.flatten(0, -2), weight, self)  # type: ignore[no-untyped-call]
        y = y if bias is None else y + bias.to(y.dtype)
        # Not a view for nothing: FSDP warns of views, which must not be changed in place.
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def cast(
        self, x: Tensor, operand: OperandId, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a matrix in 8 bits, its transpose, both row-major, and its inverse scale ()."""
        made = self.matmul.cast(x.unsqueeze(0), operand, dtype)
        return made.rows.squeeze(0), made.columns.squeeze(0), made.scale[0]


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: Fp8Linear) -> Tensor:
        matmul = linear.matmul
        x8, x_t, x_scale = linear.cast(x, linear.x, matmul.forward_dtype)
        w8, w_t, w_scale = linear.cast(weight, linear.w, matmul.forward_dtype)
        # The 8-bit operands are kept, not x: half the memory, and backward multiplies the very
        # numbers that forward did.
        ctx.save_for_backward(x_t, x_scale, w_t, w_scale)
        ctx.linear, ctx.dtypes = linear, (x.dtype, weight.dtype)
        scales = [x_scale, w_scale]
        y: Tensor = scaled_matmul(x8, w8, scales, True, matmul.dtype, matmul.count)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x_t, x_scale, w_t, w_scale = ctx.saved_tensors
        linear, matmul = ctx.linear, ctx.linear.matmul
        dtype, count = matmul.dtype, matmul.count
        g8, g_t, g_scale = linear.cast(gradients[0], linear.g, matmul.gradient_dtype)
        dx = scaled_matmul(g8, w_t, [g_scale, w_scale], False, dtype, count)
        dw = scaled_matmul(g_t, x_t, [g_scale, x_scale], False, torch.float32, count)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1]), None


class NativeBackend(Fp8Backend):
    """Plain torch: replaces the model's matmul backend, or the functions of its linear layers."""

    def __init__(
        self, fp8: Fp8Config, model: LanguageModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        """dtype: of the products' results. Raises ConfigError."""
        super().__init__(fp8, model, FP8_MULTIPLE)
        self.summary = f"native, {fp8.recipe} scaling"
        gradient_dtype = E5M2 if fp8.format == "hybrid" else E4M3
        dtypes = {
            operand: gradient_dtype if is_gradient else E4M3
            for operand, is_gradient in model.matmul_operands().items()
        }
        self.scales = DelayedScales(fp8, dtypes, device) if fp8.recipe == "delayed" else None
        self.matmul = NativeMatmul(E4M3, gradient_dtype, dtype, self.scales)
        if device.type == "cuda":  # casts are fused: the operands of z and dv remain
            self.matmul.operand_bytes = 4
        if model.matmul_backend is not None:
            model.matmul_backend = self.matmul
        else:
            # Scales that a step changes are side effects, which a compiled layer cannot have.
            # Fused layers are not affected: they compile what is between the products.
            self.compiles = self.scales is None
        for name, linear in model.hidden_linears().items():
            linear.linear_fn = Fp8Linear(self.matmul, f"{name}.weight")

    @property
    def matmul_count(self) -> int:
        return int(self.matmul.count)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.matmul.recording = self.scales is not None
        try:
            with super().training():
                yield
        finally:
            self.matmul.recording = False

    def end_step(self, all_reduce_max: Callable[[Tensor], Tensor]) -> None:
        if self.scales is not None:
            self.scales.end_step(all_reduce_max)

    def metrics(self) -> dict[str, float]:
        found = super().metrics()
        clipped = self.scales.take_clipped() if found and self.scales is not None else None
        return found if clipped is None else {**found, "train/fp8_clipped": clipped}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scales is None else self.scales.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        return self.scales is None or (bool(state) and self.scales.load_state_dict(state))
