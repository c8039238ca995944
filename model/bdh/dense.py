"""BDH's layers by the plain formulas, on whole tensors: only for Transformer Engine.

Its modules compute whole products and bring their own backward pass, for which `fused_layers` has
no place. They are `Projections` here, and autograd differentiates the rest. It costs what fused
layers avoid: a layer keeps about four tensors (B, H, T, N), and scores are (T, T) per head.

B batch, T tokens, D = n_embd, H = n_head, N neurons per head
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bdh.masks import ChunkMasks
from model.bdh.tiling import Rotation
from model.compiled import compile_shapes
from model.matmul import Projections


@dataclass(frozen=True)
class DenseArgs:
    """What a pass over the layers is given besides x and the projections.

    rotation: of all T tokens, in the dtype of the products. documents: (B, T), a number per
    document; tokens attend within their own. compiled: whether to compile the elementwise work.
    """

    n_layer: int
    dropout: float
    rotation: Rotation
    documents: Tensor | None = None
    compiled: bool = False


def dense_layers(x: Tensor, projections: Projections, args: DenseArgs) -> Tensor:
    """Applies all layers with their residuals: x (B, T, D) -> (B, T, D)."""
    B, T, D = x.shape
    masks = ChunkMasks(args.documents, (B, 1, T), x.device)  # the sequence is one chunk
    hidden = masks.hidden.unsqueeze(1)  # (1 or B, 1, T, T)
    dtype = args.rotation.cos.dtype
    stream = x.to(torch.promote_types(dtype, torch.float32))
    for layer in range(args.n_layer):
        y = _layer(stream.to(dtype), hidden, layer, projections, args)
        stream = F.layer_norm(stream + F.layer_norm(y.to(stream.dtype), (D,)), (D,))
    return stream.to(x.dtype)


def _layer(
    x: Tensor, hidden: Tensor, layer: int, projections: Projections, args: DenseArgs
) -> Tensor:
    """Returns the output of a layer before its norm and residual, (B, T, D)."""
    B, T, D = x.shape
    activate, gate = _activate, _gate
    if args.compiled:
        activate, gate = _compile(_activate), _compile(_gate)
    u = projections.encode(x, layer).to(x.dtype)  # (B, H, T, N)
    s, r = activate(u, args.rotation.cos, args.rotation.sin)
    scores = (r @ r.mT).masked_fill(hidden, 0)  # (B, H, T, T)
    a = (scores.flatten(1, 2) @ x).view(B, -1, T, D)
    a = F.layer_norm(a.to(torch.promote_types(a.dtype, torch.float32)), (D,)).to(x.dtype)
    v = projections.encode_v(a, layer).to(x.dtype)
    return projections.decode(gate(s, v, args.dropout), layer)


def _activate(u: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns s = relu(u) and r = rope(s), (B, H, T, N); see `BDH` for the order of neurons."""
    s = u.relu()
    first, second = s.chunk(2, -1)
    return s, torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _gate(s: Tensor, v: Tensor, dropout: float) -> Tensor:
    z = s * v.relu()
    return F.dropout(z, dropout) if dropout else z


_compile = cache(compile_shapes)
