"""FP8 in plain torch: products of weights with 8-bit operands, on CUDA by `torch._scaled_mm`.

An 8-bit float has a few bits of mantissa (e4m3) or one fewer and a wider range (e5m2, for gradients
under `hybrid`). Each operand is multiplied by a scale that brings its largest number to the end of
the range, cast, and the product divided by the scales again. Which scale:

    current   from the operand itself: for each head and tile its own
    delayed   from the largest numbers that the same operand had in earlier steps, so that casting
              takes one pass; numbers beyond it are clipped, and how often is measured

A CPU multiplies the same 8-bit operands as float32, which is how this is tested.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433; NVIDIA's
Transformer Engine for the recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from config import Fp8Config
from model.matmul import Accumulator, OperandId

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-100  # a lower largest number would make the scale infinite


class Made:
    """How many 8-bit products were made; counted where they are."""

    count = 0


def multiply(
    left: Tensor, right: Tensor, scales: Sequence[Tensor], fast: bool, out: Tensor
) -> Tensor:
    """left (M, K) @ right (N, K)^T into `out`, both 8-bit and row-major, times both scales."""
    Made.count += 1
    if left.device.type == "cpu":
        # `_scaled_mm` takes seconds on CPUs with AMX. float32 holds every 8-bit float and most sums
        # of their products, so the result hardly depends on the CPU; it is rounded once. Scales
        # come last: as `alpha` of the product a scale that is NaN would be lost.
        product = left.float() @ right.float().mT
        return out.copy_(product.mul_(scales[0] * scales[1]))
    return torch._scaled_mm(
        left, right.mT, scales[0], scales[1], out_dtype=out.dtype, use_fast_accum=fast, out=out
    )


@torch.library.custom_op("hatchery::scaled_product", mutates_args=())
def scaled_product(
    left: Tensor, right: Tensor, scales: Sequence[Tensor], fast: bool, dtype: torch.dtype
) -> Tensor:
    """left (M, K) @ right (N, K)^T, both 8-bit and row-major, times both scales.

    An operator of its own, so that compiled graphs keep it whole and it is counted as it runs.
    """
    out = left.new_empty(left.shape[0], right.shape[0], dtype=dtype)
    return multiply(left, right, scales, fast, out)


@scaled_product.register_fake
def _(
    left: Tensor, right: Tensor, scales: Sequence[Tensor], fast: bool, dtype: torch.dtype
) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0], dtype=dtype)


class Cast:
    """Matrices (g, M, K) in 8 bits: `rows`, `columns` (g, K, M), and what to multiply by, (g,)."""

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        self.rows, self.scale = rows, scale
        self._columns: Tensor | None = None

    @property
    def columns(self) -> Tensor:
        """The transpose, row-major as products take it; made once."""
        if self._columns is None:
            self._columns = self.rows.mT.contiguous()
        return self._columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, heads: slice) -> Cast:
        part = Cast(self.rows[heads], self.scale[heads])
        part._columns = self.columns[heads]
        return part


def largest(dtype: torch.dtype) -> float:
    """The largest number of an 8-bit format."""
    return torch.finfo(dtype).max


def cast_by_own(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (g, M, K) in 8 bits by a scale per matrix; the inverse scales and maxima, (g,) each."""
    most = x.abs().amax((1, 2)).float()
    scale = largest(dtype) / most.clamp(min=SMALLEST)
    return _scaled(x, scale, dtype), scale.reciprocal(), most


def cast_by(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (g, M, K) in 8 bits by a given scale (); and its largest number, ()."""
    return _scaled(x, scale, dtype), x.abs().amax().float()


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = largest(dtype)  # casting to e5m2 would make infinities beyond it
    return (x * scale.view(-1, 1, 1)).clamp_(-limit, limit).to(dtype)


@cache
def _compiled(expression: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(expression, dynamic=False)


class DelayedScales:
    """A scale for each operand of each layer, from its largest numbers in earlier steps.

    A step, all its micro-steps together, is one entry of the history. In the first one operands are
    scaled by themselves; the scale of one that was all zeros so far is 1.
    """

    def __init__(self, fp8: Fp8Config, slots: dict[OperandId, torch.dtype], device: Any) -> None:
        self.index = {place: number for number, place in enumerate(slots)}
        self.operands = [f"{n}.{layer} {dtype}" for (n, layer), dtype in slots.items()]
        self.limits = torch.tensor([largest(dtype) for dtype in slots.values()], device=device)
        self.history = torch.zeros(fp8.amax_history_len, len(slots), device=device)
        self.scale, self.present = torch.zeros_like(self.limits), torch.zeros_like(self.limits)
        self.steps = 0
        self.most_recent = fp8.amax_compute_algo == "most_recent"
        self._clipped = torch.zeros((), device=device)  # shares, summed over steps
        self._counted = 0

    def known(self, place: OperandId) -> Tensor | None:
        """The scale of an operand, (); None in the first step."""
        return self.scale[self.index[place]] if self.steps else None

    def note(self, place: OperandId, most: Tensor) -> None:
        """Takes the largest number(s) of an operand into this step's."""
        slot = self.present[self.index[place]]
        torch.maximum(slot, most.max(), out=slot)

    def advance(self, maximum: Callable[[Tensor], Tensor]) -> None:
        """Ends a step: `maximum` makes maxima those of all processes, in place."""
        present = maximum(self.present)
        if self.steps:
            self._clipped += (present * self.scale > self.limits * 1.0001).float().mean()
            self._counted += 1
        self.history[self.steps % len(self.history)] = present
        self.steps += 1
        most = present if self.most_recent else self.history.amax(0)
        fresh = self.limits / most.clamp(min=SMALLEST)
        kept = torch.where(self.scale > 0, self.scale, torch.ones_like(fresh))
        self.scale.copy_(torch.where(most > 0, fresh, kept))
        present.zero_()

    def take_clipped(self) -> float | None:
        """The share of operands whose largest number was clipped, since the last call."""
        if not self._counted:
            return None
        share = float(self._clipped) / self._counted
        self._clipped.zero_()
        self._counted = 0
        return share

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and values."""
        return {
            "operands": self.operands,
            "history": self.history,
            "scale": self.scale,
            "steps": self.steps,
            "clipped": self._clipped,
            "counted": self._counted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Whether what `state_dict` gave belongs to the same operands and was taken over."""
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
    """Products with weights in 8 bits: a `model.matmul.MatmulBackend`."""

    compiled = False
    operand_bytes = 12  # a cast in float32, two operands in both layouts, and what products take

    def __init__(
        self, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], scales: DelayedScales | None
    ) -> None:
        """dtypes: of operands, of gradients, and of what products give."""
        self.forward_dtype, self.gradient_dtype, self.dtype = dtypes
        self.scales = scales
        self.recording = False  # whether maxima are those of a training step

    def weight(self, value: Tensor, name: str) -> Cast:
        return self.cast(value, OperandId(name, 0), self.forward_dtype)

    def activation(self, value: Tensor, operand: OperandId, shared: bool = False) -> Cast:
        return self.cast(value, operand, self.forward_dtype)

    def gradient(self, value: Tensor, operand: OperandId) -> Cast:
        return self.cast(value, operand, self.gradient_dtype)

    def forward(self, x: Cast, weight: Cast, out: Tensor | Accumulator | None = None) -> Tensor:
        return self._multiply((x.rows, x.scale), (weight.columns, weight.scale), out, fast=True)

    def grad_input(
        self, gradient: Cast, weight: Cast, out: Tensor | Accumulator | None = None
    ) -> Tensor:
        return self._multiply((gradient.rows, gradient.scale), (weight.rows, weight.scale), out)

    def grad_weight(self, x: Cast, gradient: Cast) -> Tensor:
        left, right = (x.columns, x.scale), (gradient.columns, gradient.scale)
        g = max(len(x), len(gradient))
        shape = (g, left[0].shape[1], right[0].shape[1])
        return self._multiply(left, right, left[0].new_empty(shape, dtype=torch.float32))

    def _multiply(
        self,
        left: tuple[Tensor, Tensor],
        right: tuple[Tensor, Tensor],
        out: Tensor | Accumulator | None,
        fast: bool = False,
    ) -> Tensor:
        """left (g, M, K) @ right (g, N, K)^T; with few bits for sums on the way where `fast`."""
        g = max(len(left[0]), len(right[0]))
        shape = (g, left[0].shape[1], right[0].shape[1])
        if isinstance(out, Tensor):
            product = out
        else:
            dtype = self.dtype if out is None else torch.float32
            product = left[0].new_empty(shape, dtype=dtype)
        for head in range(g):
            a, scale_a = (part[head % len(part)] for part in left)
            b, scale_b = (part[head % len(part)] for part in right)
            multiply(a, b, (scale_a, scale_b), fast, product[head])
        if out is None or isinstance(out, Tensor):
            return product
        out.add_product(product)
        return out.total

    def cast(self, value: Tensor, operand: OperandId, dtype: torch.dtype) -> Cast:
        """Matrices (g, M, K) in 8 bits."""
        scale = None if self.scales is None else self.scales.known(operand)
        if scale is None:
            expression = _compiled(cast_by_own) if self.compiled else cast_by_own
            rows, inverse, most = expression(value, dtype)
        else:
            expression = _compiled(cast_by) if self.compiled else cast_by
            rows, most = expression(value, scale, dtype)
            unclear = most - most  # 0, but NaN where clipping would hide an infinity
            inverse = (scale.reciprocal() + unclear).expand(len(value))
        if self.scales is not None and self.recording:
            self.scales.note(operand, most)
        return Cast(rows.contiguous(), inverse)
