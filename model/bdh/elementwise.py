"""The elementwise work of BDH's kernels, on one tile of neurons at a time.

Everything that is not a matrix product happens here, in few passes. Each is written twice: as an
expression that `torch.compile` fuses into a single loop, and as in-place calls for machines without
a compiler. Both leave the same numbers, up to the rounding between the calls.

A tile holds pre-activations u = x E and v = a G of n neurons, (g, X, C, n): g heads, X chunks of C
tokens. Its first n/2 neurons are the first members of the rotated pairs. relu is idempotent, so a
pass may be given activations instead; those of `EAGER` leave them behind.

Dropout draws nothing: whether an element is kept is a hash of the seed, the layer, the token and
the neuron, so backward finds the mask of forward again, whatever the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 2**32 - 1
_ODD = (0x7FEB352D, 0x846CA68B - 2**32)  # multipliers of a 32-bit mixer (Wellons, "lowbias32")


Halves = tuple[Tensor, Tensor]
"""First and second members of rotated pairs."""


class Keep(NamedTuple):
    """Which elements of a tile dropout keeps: those whose hash is at least `least`."""

    rows: Tensor  # (X, C, 1) int32, random per layer and token
    columns: Tensor  # (g, 1, 1, n) int32, random per neuron
    least: int


class Passes(NamedTuple):
    """The passes, compiled or not; each writes into the tensors it is given.

    turn(u, cos, sin, r): r = rope(relu(u))
    turn_backward(u, dr, cos, sin, du): du += the gradient of u by way of r
    gate(u, v, keep): v = relu(u) * relu(v), where kept
    gate_backward(u, v, dz, keep, du): from dz: v = z, dz = dv, du = the gradient of u by way of z

    carry(part, state, goes_on, cos, sin): part = state; returns what state * goes_on + part, as it
        was, becomes when it is turned back
    add(total, product): total += product

    cos, sin: (C, n/2) in turn; (n/2, 1) in carry, where part and state are (g, B, n, D) and
    goes_on is (B, 1, 1) or None. total and product have two dimensions and any dtypes.
    """

    turn: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    turn_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    gate: Callable[[Tensor, Tensor, Keep | None], None]
    gate_backward: Callable[[Tensor, Tensor, Tensor, Keep | None, Tensor], None]
    carry: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor], object]


def _halves(x: Tensor, dim: int = -1) -> Halves:
    first, second = x.chunk(2, dim)
    return first, second


def _kept(keep: Keep, like: Tensor) -> Tensor:
    """1 where an element is kept, else 0, in like's dtype and shape."""
    x = keep.rows + keep.columns
    x.bitwise_xor_(x >> 16).mul_(_ODD[0])
    x.bitwise_xor_(x >> 15).mul_(_ODD[1])
    return torch.empty_like(like).copy_(x.ge_(keep.least))


def _turn(u: Tensor, cos: Tensor, sin: Tensor, r: Tensor) -> None:
    (a, b), (r1, r2) = _halves(u.relu_()), _halves(r)
    torch.mul(a, cos, out=r1).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=r2).addcmul_(a, sin)


def _turn_backward(u: Tensor, dr: Tensor, cos: Tensor, sin: Tensor, du: Tensor) -> None:
    a, b = _halves(dr)
    first = (a * cos).addcmul_(b, sin)
    b.mul_(cos).addcmul_(a, sin, value=-1)
    a.copy_(first)
    du.add_(_where_positive(dr, u))


def _gate(u: Tensor, v: Tensor, keep: Keep | None) -> None:
    v.relu_().mul_(u.relu_())
    if keep is not None:
        v.mul_(_kept(keep, v))


def _gate_backward(u: Tensor, v: Tensor, dz: Tensor, keep: Keep | None, du: Tensor) -> None:
    s, y = u.relu_(), v.relu_()
    mask = None if keep is None else _kept(keep, v)
    if mask is not None:
        dz.mul_(mask)
    torch.mul(dz, y, out=du)
    _where_positive(du, s)
    _where_positive(dz.mul_(s), y)
    y.mul_(s)
    if mask is not None:
        y.mul_(mask)


def _where_positive(gradient: Tensor, x: Tensor) -> Tensor:
    """Zeroes the gradient, in place, where relu(x) is flat."""
    torch.ops.aten.threshold_backward.grad_input(gradient, x, 0, grad_input=gradient)
    return gradient


def _carry(part: Tensor, state: Tensor, goes_on: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = _halves(part + (state if goes_on is None else state * goes_on), -2)
    part.copy_(state)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -2)


EAGER = Passes(_turn, _turn_backward, _gate, _gate_backward, _carry, Tensor.add_)


@cache
def compiled() -> Passes:
    """The passes fused by torch.compile; the first call with a new shape compiles for a second.

    Halves are passed as tensors of their own: written as slices, each store would be a blend of the
    whole tile. Two traps of torch 2.13, both silent: halves that are written to must start at the
    same place of their storage at every call (buffers do), and what one input is given must be
    computed, not another input that changes too.
    """
    limit = torch._dynamo.config.recompile_limit  # of shapes; beyond it nothing is fused
    torch._dynamo.config.recompile_limit = max(limit, 64)
    turn, turn_backward, gate, gate_backward = (
        torch.compile(expression, dynamic=False)
        for expression in (_turn_fused, _turn_backward_fused, _gate_fused, _gate_backward_fused)
    )
    return Passes(
        lambda u, cos, sin, r: turn(_halves(u), cos, sin, _halves(r)),
        lambda u, dr, cos, sin, du: turn_backward(_halves(u), _halves(dr), cos, sin, _halves(du)),
        gate,
        gate_backward,
        torch.compile(_carry, dynamic=False),
        torch.compile(_add_fused, dynamic=True),
    )


def _turn_fused(u: Halves, cos: Tensor, sin: Tensor, r: Halves) -> None:
    a, b = u[0].relu(), u[1].relu()
    r[0].copy_(a * cos - b * sin)
    r[1].copy_(b * cos + a * sin)


def _turn_backward_fused(u: Halves, dr: Halves, cos: Tensor, sin: Tensor, du: Halves) -> None:
    a, b = dr
    du[0].add_(torch.where(u[0] > 0, a * cos + b * sin, 0))
    du[1].add_(torch.where(u[1] > 0, b * cos - a * sin, 0))


def _is_kept(keep: Keep) -> Tensor:
    x = keep.rows + keep.columns
    x = (x ^ (x >> 16)) * _ODD[0]
    x = (x ^ (x >> 15)) * _ODD[1]
    return x >= keep.least


def _gate_fused(u: Tensor, v: Tensor, keep: Keep | None) -> None:
    z = u.relu() * v.relu()
    v.copy_(z if keep is None else torch.where(_is_kept(keep), z, 0))


def _gate_backward_fused(u: Tensor, v: Tensor, dz: Tensor, keep: Keep | None, du: Tensor) -> None:
    s, y = u.relu(), v.relu()
    z, d = s * y, dz
    if keep is not None:
        kept = _is_kept(keep)
        z, d = torch.where(kept, z, 0), torch.where(kept, d, 0)
    dv = torch.where(v > 0, d * s, 0)
    du.copy_(torch.where(u > 0, d * y, 0))
    v.copy_(z)
    dz.copy_(dv)


def _add_fused(total: Tensor, product: Tensor) -> None:
    total.add_(product)


def hashed(keys: Tensor) -> Tensor:
    """Integers (any shape) to int32 that look random: the finaliser of splitmix64."""
    x = keys.to(torch.int64)
    for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * (odd - 2**64)
    x = (x ^ ((x >> 31) & (2**33 - 1))) & _MASK
    return (x - 2**31).to(torch.int32)
