"""Products of activations with weights, behind an interface that number formats implement.

A layer y = x W multiplies three times in a training step. Operands are prepared once, e.g. cast to
8 bits with a scale, and then used in every product they take part in:

    x, w = backend.activation(x, operand), backend.weight(w, name)
    y = backend.forward(x, w)                     # x W
    dy = backend.gradient(dy, operand)
    dx = backend.grad_input(dy, w)                # dy W^T
    dw = backend.grad_weight(x, dy)               # x^T dy

A model multiplies by its hidden weights in one of three ways, each of which can be replaced:

    Linear            calls its function `linear_fn`
    MatmulBackend     is called by BDH's fused layers, tile by tile
    Projections       take the whole of a BDH layer's products, with a backward pass of their own

Matrices are (g, rows, columns): g heads at once. An operand of one head, (1, ...), is shared by all
heads of the other operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""


class Linear(nn.Linear):
    """A linear layer whose product can be replaced, by assigning `linear_fn`.

    It does not initialize its weights, since models do; n_fused: equal matrices stacked in it.
    """

    linear_fn: LinearFunction = staticmethod(F.linear)

    def __init__(self, inputs: int, outputs: int, bias: bool, n_fused: int = 1) -> None:
        super().__init__(inputs, outputs, bias)
        self.n_fused = n_fused

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fn(x, self.weight, self.bias)

    if TYPE_CHECKING:  # nn.Module declares calls as Any

        def __call__(self, x: Tensor) -> Tensor: ...


class OperandId(NamedTuple):
    """Tells an operand from all others of a model, for scales that depend on its past."""

    name: str
    layer: int


class Accumulator:
    """A sum of matrix products in a buffer, which may have a wider dtype than the products."""

    def __init__(
        self, total: Tensor, add: Callable[[Tensor, Tensor], object], is_empty: bool = True
    ) -> None:
        self.total, self.is_empty = total, is_empty
        self._add = add  # (total, product), both 2-D, of any dtypes

    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds left (g, a, b) @ right (g, b, c)."""
        total = self.total.view(*left.shape[:2], right.shape[2])
        # beta=0 ignores what the buffer holds, even NaN: it need not be zeroed before.
        beta = 0 if self.is_empty else 1
        if left.dtype == total.dtype:
            total.baddbmm_(left, right, beta=beta)
        elif left.is_cuda:
            # The sum is part of the product, whose result is never rounded to 16 bits. torch has
            # this operator on CUDA alone.
            torch.baddbmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
        else:
            self.add_product(torch.bmm(left, right))
        self.is_empty = False

    def add_product(self, product: Tensor) -> None:
        """Adds a product (g, a, c)."""
        total = self.total.view(product.shape)
        if self.is_empty:
            total.copy_(product)
        elif total.is_contiguous():
            self._add(total.flatten(0, 1), product.flatten(0, 1))
        else:  # part of a larger buffer
            total.add_(product)
        self.is_empty = False


class MatmulBackend(Protocol):
    """Computes products with weights in some number format.

    Prepared operands are opaque to the caller, but for the heads of weights: `len(w)`, `w[2:4]`.
    """

    compiled: bool
    """Whether to compile the casts of operands."""

    operand_bytes: int
    """Memory of a tile's operands per element of the tile, on top of the tile itself."""

    def weight(self, value: Tensor, name: str) -> Any:
        """Prepares a weight (g, in, out), of any strides."""

    def activation(self, value: Tensor, operand: OperandId, shared: bool = False) -> Any:
        """Prepares an activation (g, M, in); shared: it is multiplied by several tiles' weights."""

    def gradient(self, value: Tensor, operand: OperandId) -> Any:
        """Prepares the gradient of an output, (g, M, out)."""

    def forward(self, x: Any, weight: Any, out: Tensor | Accumulator | None = None) -> Tensor:
        """Returns x W, (g, M, out); written or added to `out` where given."""

    def grad_input(
        self, gradient: Any, weight: Any, out: Tensor | Accumulator | None = None
    ) -> Tensor:
        """Returns dy W^T, (g, M, in); written or added to `out` where given."""

    def grad_weight(self, x: Any, gradient: Any, out: Accumulator | None = None) -> Tensor:
        """Returns x^T dy, (g, in, out); added to `out` where given."""


class PlainActivation:
    """An activation, and its transpose where that is used often."""

    def __init__(self, value: Tensor, shared: bool) -> None:
        self.value, self._shared = value, shared
        self._columns: Tensor | None = None

    @property
    def columns(self) -> Tensor:
        """The transpose, (g, in, M)."""
        if self._columns is None:
            self._columns = self.value.mT.contiguous() if self._shared else self.value.mT
        return self._columns


class PlainMatmul:
    """The backend that computes in the dtype of the operands."""

    compiled = False
    operand_bytes = 0

    def weight(self, value: Tensor, name: str) -> Tensor:
        return value

    def activation(
        self, value: Tensor, operand: OperandId, shared: bool = False
    ) -> PlainActivation:
        return PlainActivation(value, shared)

    def gradient(self, value: Tensor, operand: OperandId) -> Tensor:
        return value

    def forward(
        self, x: PlainActivation, weight: Tensor, out: Tensor | Accumulator | None = None
    ) -> Tensor:
        return _multiply(x.value, weight, out)

    def grad_input(
        self, gradient: Tensor, weight: Tensor, out: Tensor | Accumulator | None = None
    ) -> Tensor:
        return _multiply(gradient, weight.mT, out)

    def grad_weight(
        self, x: PlainActivation, gradient: Tensor, out: Accumulator | None = None
    ) -> Tensor:
        return _multiply(x.columns, gradient, out)


def _multiply(left: Tensor, right: Tensor, out: Tensor | Accumulator | None) -> Tensor:
    g = max(len(left), len(right))
    left, right = left.expand(g, -1, -1), right.expand(g, -1, -1)
    if isinstance(out, Accumulator):
        out.add(left, right)
        return out.total
    return torch.bmm(left, right, out=out)


class Projections(Protocol):
    """BDH's three products with weights in one forward pass, by modules with a backward pass of
    their own, through which gradients reach the weights.

    Results may have any strides, and the dtype of the products or a wider one.
    """

    def encode(self, x: Tensor, layer: int) -> Tensor:
        """Returns x encoder: (B, T, D) -> (B, H, T, N)."""

    def encode_v(self, a: Tensor, layer: int) -> Tensor:
        """Returns a encoder_v, each head by its own matrix: (B, H, T, D) -> (B, H, T, N)."""

    def decode(self, z: Tensor, layer: int) -> Tensor:
        """Returns z decoder, summed over heads: (B, H, T, N) -> (B, T, D)."""


ProjectionFactory = Callable[[tuple[Tensor, Tensor, Tensor]], Projections]
"""Called with encoder, encoder_v and decoder, once per forward pass: all layers share them."""
