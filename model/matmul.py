"""The products of a layer with its weights, behind an interface: they can be computed otherwise.

A linear layer multiplies three times: forward by its weights, backward by them transposed, and once
for the gradient of the weights. What is multiplied is made ready first, once for all its products:

    x, w = products.rows(x, place), products.weight(w, name)
    y = products.times(x, w)                      # x W
    dy = products.gradient(dy, place)
    dx = products.back(dy, w)                     # dy W^T
    dw = products.outer(x, dy)                    # x^T dy

All matrices are (g, rows, columns): g heads at once; an operand of one head, (1, ...), is shared by
all heads of the other one. `into` is a tensor to write to or a `Sum` to add to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Place = tuple[str, int]
"""The name of an operand, and the layer it belongs to."""


class Sum:
    """A sum of matrix products in a tensor of its own, which may have a wider dtype than they."""

    def __init__(self, total: Tensor, add: Callable[[Tensor, Tensor], object]) -> None:
        self.total, self.fresh = total, True
        self._add = add  # (total, product), both 2-D, of any dtypes

    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds left (g, a, b) @ right (g, b, c)."""
        if left.dtype != self.total.dtype:
            return self.add_product(torch.bmm(left, right))
        total = self.total.view(*left.shape[:2], right.shape[2])
        total.baddbmm_(left, right, beta=0 if self.fresh else 1)
        self.fresh = False
        return None

    def add_product(self, product: Tensor) -> None:
        """Adds a product (g, a, c)."""
        total = self.total.view(product.shape)
        if self.fresh:
            total.copy_(product)
        else:
            self._add(total.flatten(0, 1), product.flatten(0, 1))
        self.fresh = False


class Products(Protocol):
    """Operands are opaque to the caller, but for the heads of weights: `len(w)`, `w[2:4]`."""

    fused: bool
    """Whether to compile what lies between products."""

    operand_bytes: int
    """Memory that operands of a tile take, per element of the tile, beside the tile itself."""

    def weight(self, value: Tensor, name: str) -> Any:
        """A weight (g, in, out), of any strides."""

    def rows(self, value: Tensor, place: Place, shared: bool = False) -> Any:
        """What is multiplied forward, (g, M, in); `shared`: by the weights of several tiles."""

    def gradient(self, value: Tensor, place: Place) -> Any:
        """A gradient (g, M, out)."""

    def times(self, x: Any, weight: Any, into: Tensor | Sum | None = None) -> Tensor:
        """x W, (g, M, out)."""

    def back(self, gradient: Any, weight: Any, into: Tensor | Sum | None = None) -> Tensor:
        """dy W^T, (g, M, in)."""

    def outer(self, x: Any, gradient: Any) -> Tensor:
        """x^T dy, (g, in, out)."""


class _Rows:
    """A matrix, and its transpose where that is used often."""

    def __init__(self, value: Tensor, shared: bool) -> None:
        self.value, self._shared = value, shared
        self._columns: Tensor | None = None

    @property
    def columns(self) -> Tensor:
        if self._columns is None:
            self._columns = self.value.mT.contiguous() if self._shared else self.value.mT
        return self._columns


class PlainProducts:
    """In the dtype of the operands."""

    fused = False
    operand_bytes = 0

    def weight(self, value: Tensor, name: str) -> Tensor:
        return value

    def rows(self, value: Tensor, place: Place, shared: bool = False) -> _Rows:
        return _Rows(value, shared)

    def gradient(self, value: Tensor, place: Place) -> Tensor:
        return value

    def times(self, x: _Rows, weight: Tensor, into: Tensor | Sum | None = None) -> Tensor:
        return _multiply(x.value, weight, into)

    def back(self, gradient: Tensor, weight: Tensor, into: Tensor | Sum | None = None) -> Tensor:
        return _multiply(gradient, weight.mT, into)

    def outer(self, x: _Rows, gradient: Tensor) -> Tensor:
        return _multiply(x.columns, gradient, None)


def _multiply(left: Tensor, right: Tensor, into: Tensor | Sum | None) -> Tensor:
    g = max(len(left), len(right))
    left, right = left.expand(g, -1, -1), right.expand(g, -1, -1)
    if isinstance(into, Sum):
        into.add(left, right)
        return into.total
    return torch.bmm(left, right, out=into)
