"""What BDH asks of a GPU, on the meta device in its place: tensors have shapes and strides but no
numbers. An operator that exists on CUDA alone is checked as CUDA would check it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.bdh.elementwise import EAGER
from model.bdh.fused_layers import fused_layers
from model.bdh.tiling import Tiling, rope_frequencies, rotation
from model.bdh.workspace import LayerStackArgs

META = torch.device("meta")


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Counts products of matrices, and stands for the one that torch has on CUDA alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.counts = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        self.counts[name] += "bmm" in name
        if func is torch.ops.aten.baddbmm.dtype_out:
            return summed(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def summed(
    total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor, beta: int = 1
) -> Tensor:
    """What CUDA demands of a sum within a product, and what it needs not to copy the sum."""
    assert total is out and dtype == out.dtype == torch.float32
    assert left.dtype == right.dtype == torch.bfloat16
    assert out.shape == (left.shape[0], left.shape[1], right.shape[2])
    assert (left.shape[0], left.shape[2]) == right.shape[:2]
    assert out.stride(2) == 1 and out.stride(1) >= out.shape[2]
    assert beta in (0, 1)
    return out


@pytest.fixture(autouse=True)
def meta_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))


def step(batch: int, length: int, documents: bool, dropout: float = 0.1) -> Counter[str]:
    """The products of a step of two layers, 4 heads, D 32, N 64; with the plan for a GPU."""
    H, D, N = 4, 32, 64
    tiling = Tiling.of((batch, length), (H, D, N), torch.bfloat16, on_cpu=False)
    sizes = ((batch, length, D), (H, D, N), (H, D, N), (H * N, D))
    x, *weights = (torch.empty(size, device=META, requires_grad=True) for size in sizes)
    ids = torch.empty(batch, length, dtype=torch.long, device=META)
    args = LayerStackArgs(
        n_layer=2,
        dropout=dropout,
        rotation=rotation(rope_frequencies(N), tiling.chunk, torch.bfloat16, META),
        tiling=tiling,
        ops=EAGER._replace(add=unwanted),
        documents=ids if documents else None,
    )
    with Products() as mode:
        output = fused_layers(x, (weights[0], weights[1], weights[2]), args)
        torch.autograd.backward(output.sum())
    counts: Counter[str] = mode.counts
    return counts


def unwanted(_total: Tensor, _product: Tensor) -> None:
    raise AssertionError("a sum that is not part of its product")


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("batch, length", [(2, 64), (1, 300), (3, 600)])
def test_a_step_on_cuda_adds_nothing_outside_of_products(
    batch: int, length: int, documents: bool
) -> None:
    counts = step(batch, length, documents)
    assert counts["aten.baddbmm.dtype_out"] > 0


def test_a_layer_on_cuda_takes_16_products() -> None:
    """F1, F2, F3, F5, F7 of one chunk in one strip; u and v again; B1 to B10 without the norm."""
    assert step(2, 64, documents=False).total() == 2 * (5 + 2 + 9)
