"""The kernel that casts to 8 bits in both layouts, against torch's own casts.

tests/precision/test_fp8_cast.py runs this file in Triton's interpreter, on a CPU. That checks
layouts, masks, scales, clipping and amax, but not the conversion itself: the interpreter's own
rounds wrongly where a mantissa overflows (Triton 3.6), so that torch's takes its place.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from config import Fp8Config
from engine.precision import fp8_native
from engine.precision.fp8_native import (
    E4M3,
    E5M2,
    DelayedScales,
    NativeMatmul,
    cast_with_own_amax,
    cast_with_scale,
    largest,
)
from model.matmul import OperandId
from tests.gpu.devices import DEVICE, ON_CUDA, gpu_tests

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    *gpu_tests,
    pytest.mark.skipif(not (ON_CUDA or INTERPRETED), reason="needs CUDA or Triton's interpreter"),
]
DTYPES = {"fp8e4nv": E4M3, "fp8e5": E5M2}
X = OperandId("x", 0)
SHAPES = [(1, 16, 16), (3, 128, 256), (2, 144, 48), (1, 400, 272)]


@pytest.fixture(autouse=True)
def conversion_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    own = builder.create_fp_to_fp

    def convert(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        dtype = DTYPES.get(str(kind.scalar))
        if dtype is None:
            return own(self, source, kind, rounding)
        bits = torch.from_numpy(source.data).to(dtype).view(torch.uint8)
        return interpreter.TensorHandle(bits.numpy(), kind.scalar)

    monkeypatch.setattr(builder, "create_fp_to_fp", convert)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers of many magnitudes, some of them halfway between two 8-bit ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    return x.to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bits, except of those that stand for NaN."""
    found = found.cpu()
    nan = expected.float().isnan()
    bits = found.view(torch.uint8) == expected.contiguous().view(torch.uint8)
    return torch.equal(found.float().isnan(), nan) and bool((bits | nan).all())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_layouts_have_the_bits_of_torchs_casts(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    from engine.precision.fp8_cast import amax_of, cast_both_layouts

    for kind in (torch.bfloat16, torch.float32):
        x = numbers(*shape, dtype=kind)
        _, inverse, amax = cast_with_own_amax(x, dtype)
        assert torch.equal(amax_of(x.to(DEVICE)).cpu(), amax)
        scale, limit = inverse.reciprocal(), largest(dtype)
        expected = (x * scale.view(-1, 1, 1)).clamp(-limit, limit).to(dtype)
        found = cast_both_layouts(x.to(DEVICE), scale.to(DEVICE), dtype)
        assert same(found[0], expected) and same(found[1], expected.mT)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_given_scale_clips_and_amax_tells_it(dtype: torch.dtype) -> None:
    from engine.precision.fp8_cast import cast_both_layouts

    x = numbers(2, 160, 144)
    x[0, 3] = torch.nan
    scale = torch.tensor(100.0)
    rows, amax = cast_with_scale(x, scale, dtype)
    for value in (x, x.mT.contiguous().mT):  # of any strides
        found = cast_both_layouts(value.to(DEVICE), scale.to(DEVICE), dtype)
        assert same(found[0], rows) and same(found[1], rows.mT)
        assert amax.isnan() and found[2].amax().isnan()
        assert found[2][1].amax().cpu() == x[1].abs().amax()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_native, "_has_cast_kernel", lambda x: True)
    x = numbers(2, 32, 48)
    x[1, 5, 7] = bad
    fp8 = Fp8Config(recipe="delayed", amax_history_len=3, amax_compute_algo="max")
    scales = DelayedScales(fp8, {X: E4M3}, DEVICE)
    for _ in range(2):  # by its own amax, then by that of the step before
        made = NativeMatmul(E4M3, E5M2, torch.bfloat16, scales).activation(x.to(DEVICE), X)
        values = made.rows.float() * made.scale.view(-1, 1, 1)
        assert not values[1].isfinite().all()
        scales.end_step(lambda values: values)


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_operands_are_those_of_a_cpu(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both layouts, scales, and what later scales follow from."""
    x = numbers(3, 48, 80)
    found = []
    for device, kernel in ((torch.device("cpu"), False), (DEVICE, True)):
        monkeypatch.setattr(fp8_native, "_has_cast_kernel", lambda x, kernel=kernel: kernel)
        fp8 = Fp8Config(recipe="delayed", amax_history_len=3, amax_compute_algo="max")
        scales = DelayedScales(fp8, {X: E4M3}, device) if recipe == "delayed" else None
        backend = NativeMatmul(E4M3, E5M2, torch.bfloat16, scales)
        backend.recording = True
        operands = []
        for factor in (1.0, 1.5):
            operands.append(backend.activation((x * factor).to(device), X))
            if scales is not None:
                scales.end_step(lambda values: values)
        found.append((operands, scales))
    (expected, cpu_scales), (operands, scales) = found
    for one, other in zip(operands, expected, strict=True):
        assert same(one.rows, other.rows) and same(one.columns, other.columns)
        torch.testing.assert_close(one.scale.cpu(), other.scale, rtol=1e-6, atol=0)
    if scales is not None and cpu_scales is not None:
        assert torch.equal(scales.history.cpu(), cpu_scales.history)
