"""Sums of products on a GPU: within the product, and over groups of sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.bdh.tiling import Tiling
from model.matmul import Accumulator
from tests.gpu.devices import DEVICE, cuda_only, gpu_tests
from tests.model.bdh_reference import error, small_bdh

pytestmark = gpu_tests

Operands = tuple[Tensor, Tensor]
LAYOUTS: dict[str, Callable[[Tensor, Tensor], Operands]] = {
    "contiguous": lambda left, right: (left, right),
    "transposed": lambda left, right: (left.mT.contiguous().mT, right.mT.contiguous().mT),
    "shared": lambda left, right: (left[:1].expand_as(left), right),
    "strip": lambda left, right: (left[:, 16:48], right),
}


@cuda_only
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_products_are_never_rounded_to_16_bits(
    dtype: torch.dtype, layout: str, heads: int
) -> None:
    draw = torch.Generator(DEVICE).manual_seed(0)

    def operands() -> Operands:
        sizes = (heads, 64, 256), (heads, 256, 40)
        left, right = (torch.randn(s, generator=draw, device=DEVICE).to(dtype) for s in sizes)
        return LAYOUTS[layout](left, right)

    pairs = [operands() for _ in range(3)]
    rows = pairs[0][0].shape[1]
    # In a larger buffer of NaN, as a strip of scores is.
    total = torch.full((heads, 80, 50), torch.nan, device=DEVICE)[:, 8 : 8 + rows, :40]
    summed = Accumulator(total, not_called)
    for left, right in pairs:
        summed.add(left, right)
    expected = sum(left.double() @ right.double() for left, right in pairs)
    assert isinstance(expected, Tensor)
    assert error(total, expected) < 1e-6


def not_called(_total: Tensor, _product: Tensor) -> None:
    raise AssertionError("a sum after the product")


@pytest.mark.parametrize("length", [64, 300], ids=["one chunk", "chunks"])
def test_groups_of_sequences_are_what_all_together_are(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(64, (5, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients() -> dict[str, Tensor]:
        model = small_bdh(std=0.15, n_embd=64, n_head=4, dropout=0.25).to(DEVICE)
        torch.manual_seed(2)
        torch.autograd.backward(model(tokens).square().mean())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plan = Tiling.of

    def of(tokens: Any, shape: Any, dtype: torch.dtype, _on_cpu: bool) -> Tiling:
        return replace(plan(tokens, shape, dtype, on_cpu=False), sequences=sequences)

    monkeypatch.setattr(Tiling, "of", staticmethod(of))
    sequences = 5
    whole = gradients()
    sequences = 2
    assert {n: e for n, g in gradients().items() if not (e := error(g, whole[n])) < 1e-4} == {}
