"""BDH as a recurrent network, which generates each token in constant time and memory.

Attention without softmax is linear in the past: all that a head needs of it is the state, the sum
of r_i x_i^T over all tokens i, (N, D). Of its N rows only those of active neurons are used, a few
percent after training, and on a CPU only those are read and written.

Rope depends on distances alone. The state is rotated to the position `rotated_to`, and a token at
position t is rotated by t - rotated_to, instead of rotating the whole state for every token.

B samples, P = N / 2 rotated pairs; the state of a layer is (H, B, 2, P, D)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this fraction of active neurons, gathering their rows is faster than a whole product (CPU).
SPARSE_FRACTION = 0.15

Pair = tuple[Tensor, Tensor]
Weights = tuple[Tensor, Tensor, Tensor]
"""encoder (H, D, N), encoder_v (H, D, N), decoder (H * N, D)."""


@dataclass
class BDHState:
    """The cache of generation: 4 * n_layer * B * H * N * D bytes."""

    sums: Tensor  # (n_layer, H, B, 2, P, D)
    rows_v: Tensor | None  # encoder_v by neuron, (H * N, D), for gathering rows; None on a GPU
    frequencies: Tensor  # turns per token of each pair, (P,) in float64
    rotated_to: Tensor = field(init=False)  # () int64: the position that the sums are rotated to
    position: int = 0  # tokens seen

    def __post_init__(self) -> None:
        self.rotated_to = self.frequencies.new_zeros((), dtype=torch.long)

    def clear(self) -> None:
        """Forgets all tokens."""
        self.sums.zero_()
        self.rotated_to.zero_()
        self.position = 0

    def rotate_to_position(self) -> None:
        """Rotates the sums to the present position."""
        cos, sin = (part[:, None] for part in self.angles(self.position - self.rotated_to))
        for layer in self.sums:  # one after another: a copy of all could be too much
            first, second = layer[:, :, 0].clone(), layer[:, :, 1].clone()
            layer[:, :, 0].mul_(cos).addcmul_(second, sin)
            layer[:, :, 1].mul_(cos).addcmul_(first, sin, value=-1)
        self.rotated_to.fill_(self.position)

    def angles(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine of each pair's angle over this many tokens (), (P,) each."""
        # In float64 and reduced modulo one turn: positions may be large.
        angles = (self.frequencies * tokens).remainder(1.0) * (2 * math.pi)
        return angles.cos().to(self.sums), angles.sin().to(self.sums)


def step(x: Tensor, weights: Weights, state: BDHState, position: int | Tensor) -> Tensor:
    """Applies all layers to one token of each sample, x (B, D), at a position; updates the sums."""
    encoder, encoder_v, decoder = weights
    decoder = decoder.view(encoder.mT.shape)
    angles = state.angles(position - state.rotated_to)
    for sums in state.sums:
        s = torch.matmul(x, encoder).relu_().to(sums.dtype)  # (H, B, N)
        if state.rows_v is not None and s.count_nonzero() < SPARSE_FRACTION * s.numel():
            y = _sparse_layer(x, s, angles, (state.rows_v, decoder.flatten(0, 1)), sums)
        else:
            y = _dense_layer(x, s, angles, (encoder_v, decoder), sums)
        x = F.layer_norm(x + F.layer_norm(y, y.shape[-1:]), x.shape[-1:])
    return x


def _dense_layer(x: Tensor, s: Tensor, angles: Pair, weights: Pair, sums: Tensor) -> Tensor:
    """Computes a layer's y by whole matrices; s (H, B, N), weights (H, D, N) and (H, N, D)."""
    H, B, _, P, D = sums.shape
    r = torch.cat(_rotate(s.view(H, B, 2, P).unbind(2), angles), -1).view(H * B, 1, 2 * P)
    rows = sums.view(H * B, 2 * P, D)
    a = F.layer_norm(torch.bmm(r, rows).view(H, B, D), (D,))
    rows.baddbmm_(r.mT, x.to(rows.dtype).expand(H, B, D).reshape(H * B, 1, D))
    y = torch.bmm(a.to(weights[0].dtype), weights[0]).relu_()
    return torch.bmm((s * y).to(weights[1].dtype), weights[1]).sum(0)


def _sparse_layer(x: Tensor, s: Tensor, angles: Pair, weights: Pair, sums: Tensor) -> Tensor:
    """Computes a layer's y from active neurons only; s (H, B, N), weights (H * N, D)."""
    H, B, _, P, D = sums.shape
    # Rows are in the order of head and sample (`group`); a bag of embedding_bag sums one group's.
    groups = torch.arange(H * B, device=s.device)
    s = s.view(H * B, 2 * P)
    group, pair = (s[:, :P] + s[:, P:]).nonzero().unbind(1)  # a pair with an active member
    members = s[group, pair], s[group, P + pair]
    r = torch.stack(_rotate(members, (angles[0][pair], angles[1][pair])), 1).view(-1)
    rows = group * (2 * P) + pair
    rows = torch.stack((rows, rows + P), 1).view(-1)
    table, starts = sums.view(-1, D), 2 * torch.searchsorted(group, groups)
    a = F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=r)
    seen = x.to(table.dtype)
    seen = seen if B == 1 else seen[group % B].repeat_interleave(2, 0)
    table.index_add_(0, rows, r[:, None] * seen)

    a = F.layer_norm(a, (D,)).to(weights[0].dtype)
    group, neuron = s.nonzero().unbind(1)
    rows, starts = group // B * (2 * P) + neuron, torch.searchsorted(group, groups)
    y = torch.einsum("nd,nd->n", weights[0][rows], a[group]).relu_()
    z = (s[group, neuron] * y).to(weights[1].dtype)
    out = F.embedding_bag(rows, weights[1], starts, mode="sum", per_sample_weights=z)
    return out.view(H, B, D).sum(0)


def _rotate(members: Sequence[Tensor], angles: Pair) -> Pair:
    (first, second), (cos, sin) = members, angles
    return first * cos - second * sin, second * cos + first * sin
