"""The elementwise work of BDH's fused layers, on one tile of neurons at a time.

Everything that is not a matrix product happens here, in as few passes over memory as possible. Each
operation is written twice: as an expression that `torch.compile` fuses into a single loop, and as
in-place calls for machines without a compiler. Both give the same numbers, up to rounding between
the calls.

A tile holds the pre-activations u = x encoder and v = a encoder_v of n neurons, (g, X, C, n): g
heads, X chunks of C tokens. Its first n/2 neurons are the first members of the rotated pairs, the
others the second.

The eager operations overwrite u and v with relu(u) and relu(v); the compiled ones do not. Both
accept either: relu(relu(u)) = relu(u), and relu(u) > 0 just where u > 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from model.bdh.masks import DropoutMask
from model.compiled import compile_shapes

HASH_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # of a 32-bit hash (Wellons, "lowbias32")

Halves = tuple[Tensor, Tensor]
"""First and second members of rotated pairs."""


class ElementwiseOps(NamedTuple):
    """The operations, compiled or eager; each writes into tensors that it is given.

    apply_rope(u, cos, sin, r):
        r = rope(relu(u))
    apply_rope_backward(u, dr, cos, sin, du):
        du += rope^T(dr) * [u > 0], the gradient of u by way of r; overwrites dr
    gate(u, v, mask):
        z = relu(u) * relu(v) * mask, written over v
    gate_backward(u, v, dz, mask, du):
        du = dz * mask * relu(v) * [u > 0]
        dv = dz * mask * relu(u) * [v > 0], written over dz
        z = relu(u) * relu(v) * mask, written over v
    advance_state(chunk_sum, state, carries, cos, sin):
        returns rotate_back(state * carries + chunk_sum), then chunk_sum = state as it was
    scan_states(sums, state, carries, cos, sin, reverse):
        advance_state over K chunks, from the last one if reverse: returns the state before each
        chunk, (S, K, 2, P), and the one after all, (S, 2, P)
    add(total, product):
        total += product, both 2-D, of any dtypes

    cos and sin are (C, n/2) for rope; for advance_state they are (n/2, 1) and of a whole chunk, the
    states are (g, B, n, D), and carries is (B, 1, 1) or None for 1. For scan_states S = g * B and
    P = n/2 * D are one dimension each: sums (S, K, 2, P), carries (K, S, 1), cos and sin (P,).
    """

    apply_rope: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    apply_rope_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    gate: Callable[[Tensor, Tensor, DropoutMask | None], None]
    gate_backward: Callable[[Tensor, Tensor, Tensor, DropoutMask | None, Tensor], None]
    advance_state: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]
    scan_states: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, bool], Halves]
    add: Callable[[Tensor, Tensor], object]


def _halves(x: Tensor, dim: int = -1) -> Halves:
    first, second = x.chunk(2, dim)
    return first, second


def _mask_like(mask: DropoutMask, like: Tensor) -> Tensor:
    """Returns 1 where an element is kept, else 0, in the dtype and shape of `like`."""
    x = mask.rows + mask.columns
    x.bitwise_xor_(x >> 16).mul_(HASH_MULTIPLIERS[0])
    x.bitwise_xor_(x >> 15).mul_(HASH_MULTIPLIERS[1])
    return torch.empty_like(like).copy_(x.ge_(mask.threshold))


def _apply_rope(u: Tensor, cos: Tensor, sin: Tensor, r: Tensor) -> None:
    (a, b), (r1, r2) = _halves(u.relu_()), _halves(r)
    torch.mul(a, cos, out=r1).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=r2).addcmul_(a, sin)


def _apply_rope_backward(u: Tensor, dr: Tensor, cos: Tensor, sin: Tensor, du: Tensor) -> None:
    a, b = _halves(dr)
    first = (a * cos).addcmul_(b, sin)
    b.mul_(cos).addcmul_(a, sin, value=-1)
    a.copy_(first)
    du.add_(_where_positive(dr, u))


def _gate(u: Tensor, v: Tensor, mask: DropoutMask | None) -> None:
    v.relu_().mul_(u.relu_())
    if mask is not None:
        v.mul_(_mask_like(mask, v))


def _gate_backward(u: Tensor, v: Tensor, dz: Tensor, mask: DropoutMask | None, du: Tensor) -> None:
    s, relu_v = u.relu_(), v.relu_()
    kept = None if mask is None else _mask_like(mask, v)
    if kept is not None:
        dz.mul_(kept)
    torch.mul(dz, relu_v, out=du)
    _where_positive(du, s)
    _where_positive(dz.mul_(s), relu_v)  # dz becomes dv
    v.mul_(s)  # v becomes z
    if kept is not None:
        v.mul_(kept)


def _where_positive(gradient: Tensor, x: Tensor) -> Tensor:
    """Zeroes the gradient in place where x <= 0: relu's backward."""
    torch.ops.aten.threshold_backward.grad_input(gradient, x, 0, grad_input=gradient)
    return gradient


def _advance_state(
    chunk_sum: Tensor, state: Tensor, carries: Tensor | None, cos: Tensor, sin: Tensor
) -> Tensor:
    a, b = _halves(chunk_sum + (state if carries is None else state * carries), -2)
    chunk_sum.copy_(state)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -2)


def _scan_states(
    sums: Tensor, state: Tensor, carries: Tensor | None, cos: Tensor, sin: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    # Compiled, the loop is unrolled into one kernel that keeps the state in registers. That takes
    # loops over the same dimensions in every step, hence the shapes: with (n/2, D) instead of P, or
    # (g, B) instead of S, some steps could join two dimensions where others could not.
    count = sums.shape[1]
    first, second = state.unbind(1)
    before: dict[int, Halves] = {}
    for k in reversed(range(count)) if reverse else range(count):
        before[k] = first.to(sums.dtype), second.to(sums.dtype)
        if carries is not None:
            first, second = first * carries[k], second * carries[k]
        a, b = sums[:, k, 0] + first, sums[:, k, 1] + second
        first, second = a * cos + b * sin, b * cos - a * sin
    halves = [half for k in range(count) for half in before[k]]
    return torch.stack(halves, 1).view(sums.shape), torch.stack((first, second), 1)


EAGER = ElementwiseOps(
    _apply_rope,
    _apply_rope_backward,
    _gate,
    _gate_backward,
    _advance_state,
    _scan_states,
    Tensor.add_,
)


@cache
def compiled_ops() -> ElementwiseOps:
    """Returns the operations for torch.compile; a new shape compiles for about a second."""
    rope, rope_backward, gate, gate_backward = (
        compile_shapes(expression)
        for expression in (
            _rope_compiled,
            _rope_backward_compiled,
            _gate_compiled,
            _gate_backward_compiled,
        )
    )
    # Halves are passed as tensors of their own: written as slices, each store would be a blend of
    # the whole tile. Two traps of torch 2.13, both silent: halves that are written to must start at
    # the same offset of their storage at every call (those of the workspace do), and what is copied
    # into one input must be computed, not another input that changes too.
    return ElementwiseOps(
        lambda u, cos, sin, r: rope(_halves(u), cos, sin, _halves(r)),
        lambda u, dr, cos, sin, du: rope_backward(_halves(u), _halves(dr), cos, sin, _halves(du)),
        gate,
        gate_backward,
        compile_shapes(_advance_state),
        compile_shapes(_scan_states),
        compile_shapes(_add_compiled, dynamic=True),
    )


def _rope_compiled(u: Halves, cos: Tensor, sin: Tensor, r: Halves) -> None:
    a, b = u[0].relu(), u[1].relu()
    r[0].copy_(a * cos - b * sin)
    r[1].copy_(b * cos + a * sin)


def _rope_backward_compiled(u: Halves, dr: Halves, cos: Tensor, sin: Tensor, du: Halves) -> None:
    a, b = dr
    du[0].add_(torch.where(u[0] > 0, a * cos + b * sin, 0))
    du[1].add_(torch.where(u[1] > 0, b * cos - a * sin, 0))


def _is_kept(mask: DropoutMask) -> Tensor:
    x = mask.rows + mask.columns
    x = (x ^ (x >> 16)) * HASH_MULTIPLIERS[0]
    x = (x ^ (x >> 15)) * HASH_MULTIPLIERS[1]
    return x >= mask.threshold


def _gate_compiled(u: Tensor, v: Tensor, mask: DropoutMask | None) -> None:
    z = u.relu() * v.relu()
    v.copy_(z if mask is None else torch.where(_is_kept(mask), z, 0))


def _gate_backward_compiled(
    u: Tensor, v: Tensor, dz: Tensor, mask: DropoutMask | None, du: Tensor
) -> None:
    s, relu_v = u.relu(), v.relu()
    z, dz_kept = s * relu_v, dz
    if mask is not None:
        kept = _is_kept(mask)
        z, dz_kept = torch.where(kept, z, 0), torch.where(kept, dz, 0)
    dv = torch.where(v > 0, dz_kept * s, 0)
    du.copy_(torch.where(u > 0, dz_kept * relu_v, 0))
    v.copy_(z)
    dz.copy_(dv)


def _add_compiled(total: Tensor, product: Tensor) -> None:
    total.add_(product)
