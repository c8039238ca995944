"""BDH's layers by the plain formulas, on whole tensors, with projections made elsewhere.

`bdh_kernels` multiplies by the weights within its tiles, where an engine with modules and a
backward pass of its own has no place. Here such an engine makes the three products with weights, as
`Projections`; all else is what the formulas in `bdh` say, differentiated by autograd. Every layer
keeps about four tensors (B, H, T, N), and scores are T x T: memory is quadratic in T. Time goes
to reading and writing wide tensors, most of all where what lies between products is not compiled.

B batch, T tokens, D = n_embd, H = n_head, N neurons per head
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bdh.tiling import ChunkMasks, Rotation
from model.matmul import Projections


@dataclass(frozen=True)
class Pass:
    """What a forward pass is given besides tokens and projections.

    rotation: the angles of all T tokens, in the dtype of the products. documents: (B, T) numbers;
    tokens see their own document only. fused: whether to compile what lies between products.
    """

    n_layer: int
    dropout: float
    rotation: Rotation
    documents: Tensor | None = None
    fused: bool = False


def written_out(x: Tensor, projections: Projections, run: Pass) -> Tensor:
    """All layers with their residuals: x (B, T, D) -> (B, T, D); norms in float32 at least."""
    B, T, D = x.shape
    hidden = ChunkMasks(run.documents, (B, 1, T), x.device).hidden.unsqueeze(1)  # (1 or B, 1, T, T)
    dtype = run.rotation.cos.dtype
    stream = x.to(torch.promote_types(dtype, torch.float32))
    for number in range(run.n_layer):
        y = _layer(stream.to(dtype), hidden, number, projections, run)
        stream = F.layer_norm(stream + F.layer_norm(y.to(stream.dtype), (D,)), (D,))
    return stream.to(x.dtype)


def _layer(x: Tensor, hidden: Tensor, number: int, projections: Projections, run: Pass) -> Tensor:
    """The layer before its residual."""
    B, T, D = x.shape
    between = _compiled() if run.fused else _EAGER
    u = projections.encode(x, number).to(x.dtype)  # (B, H, T, N)
    s, r = between.activate(u, run.rotation.cos, run.rotation.sin)
    scores = (r @ r.mT).masked_fill(hidden, 0)  # (B, H, T, T)
    a = (scores.flatten(1, 2) @ x).view(B, -1, T, D)
    a = F.layer_norm(a.to(torch.promote_types(a.dtype, torch.float32)), (D,)).to(x.dtype)
    v = projections.encode_v(a, number).to(x.dtype)
    return projections.decode(between.gate(s, v, run.dropout), number)


def _activate(u: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """s and rope(s), (B, H, T, N): the halves of the neurons are the members of rotated pairs."""
    s = u.relu()
    first, second = s.chunk(2, -1)
    return s, torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _gate(s: Tensor, v: Tensor, dropout: float) -> Tensor:
    z = s * v.relu()
    return F.dropout(z, dropout) if dropout else z


class _Between(NamedTuple):
    activate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gate: Callable[[Tensor, Tensor, float], Tensor]


_EAGER = _Between(_activate, _gate)


@cache
def _compiled() -> _Between:
    return _Between(torch.compile(_activate, dynamic=False), torch.compile(_gate, dynamic=False))


def written_out_bytes(
    tokens: tuple[int, int], shape: tuple[int, int, int], dtype: torch.dtype, n_layer: int
) -> tuple[int, int]:
    """An upper estimate of the memory of the layers, the parameters and their gradients aside:
    (kept from forward on, on top in backward).

    tokens: (B, T), shape: (H, D, N). Projections are taken to hold a float32 copy of the weights
    and its gradient, and for every layer the weights in the dtype of the products.
    """
    (H, D, N), half, full = shape, dtype.itemsize, max(dtype.itemsize, 4)
    rows, weights = math.prod(tokens), 3 * H * D * N
    wide, scores = rows * H * N, rows * H * tokens[1]
    streams = rows * D * (4 * full + 2 * half) + rows * H * D * (full + 2 * half)
    kept = wide * (4 * half + 1) + scores * half + streams + weights * half
    working = wide * 6 * half + scores * 3 * half + 2 * streams + weights * full
    return n_layer * kept + weights * full, working + weights * full
