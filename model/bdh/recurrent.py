"""BDH as a recurrent network: what a head has seen is one matrix, however long the text.

Attention without softmax is a sum, so the past of a head is the state sum of r_u x_u^T, (N, D), and
a token costs the same at position 100,000 as at 10. Of the N rows only those of active neurons are
needed: a few percent after training. On a CPU only they are read and written.

Rotation depends on distances alone, so states are turned to a `frame`: a token at position t meets
them with the angle of t - frame, counted in float64.

    B samples, P = N / 2 pairs; the state of a layer is (H, B, 2, P, D)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 0.15  # active neurons, up to which picking their rows is faster than taking all (CPU)

Pair = tuple[Tensor, Tensor]
Weights = tuple[Tensor, Tensor, Tensor]
"""encoder (H, D, N), encoder_v (H, D, N), decoder (H * N, D)."""


@dataclass
class BDHState:
    """What generation carries from token to token: 4 * n_layer * B * H * N * D bytes."""

    sums: Tensor  # (n_layer, H, B, 2, P, D)
    rows_v: Tensor | None  # encoder_v by neuron, (H * N, D), where active rows are picked
    frequencies: Tensor  # turns per token of each pair, (P,) in float64
    position: int = 0  # tokens seen
    frame: int = 0  # the position that the sums are turned to

    def turn(self) -> None:
        """Turns the sums to the present position."""
        cos, sin = (part[:, None] for part in self.angles(self.position - self.frame))
        for layer in self.sums:  # one after another: a copy of all could be too much
            first, second = layer[:, :, 0].clone(), layer[:, :, 1].clone()
            layer[:, :, 0].mul_(cos).addcmul_(second, sin)
            layer[:, :, 1].mul_(cos).addcmul_(first, sin, value=-1)
        self.frame = self.position

    def angles(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each pair's angle over so many tokens, (P,) each."""
        angles = (self.frequencies * tokens).remainder(1.0) * (2 * math.pi)
        return angles.cos().to(self.sums), angles.sin().to(self.sums)


def step(x: Tensor, weights: Weights, state: BDHState) -> Tensor:
    """All layers for the next token of each sample: x (B, D) -> (B, D); the state sees it."""
    encoder, encoder_v, decoder = weights
    decoder = decoder.view(encoder.mT.shape)
    angles = state.angles(state.position - state.frame)
    for sums in state.sums:
        s = torch.matmul(x, encoder).relu_().to(sums.dtype)  # (H, B, N)
        if state.rows_v is not None and s.count_nonzero() < _FEW * s.numel():
            y = _active(x, s, angles, (state.rows_v, decoder.flatten(0, 1)), sums)
        else:
            y = _whole(x, s, angles, (encoder_v, decoder), sums)
        x = F.layer_norm(x + F.layer_norm(y, y.shape[-1:]), x.shape[-1:])
    return x


def _whole(x: Tensor, s: Tensor, angles: Pair, weights: Pair, sums: Tensor) -> Tensor:
    """One layer by whole matrices, from s (H, B, N); weights (H, D, N) and (H, N, D)."""
    H, B, _, P, D = sums.shape
    r = torch.cat(_turned(s.view(H, B, 2, P).unbind(2), angles), -1).view(H * B, 1, 2 * P)
    rows = sums.view(H * B, 2 * P, D)
    a = F.layer_norm(torch.bmm(r, rows).view(H, B, D), (D,))
    rows.baddbmm_(r.mT, x.to(rows.dtype).expand(H, B, D).reshape(H * B, 1, D))
    y = torch.bmm(a.to(weights[0].dtype), weights[0]).relu_()
    return torch.bmm((s * y).to(weights[1].dtype), weights[1]).sum(0)


def _active(x: Tensor, s: Tensor, angles: Pair, weights: Pair, sums: Tensor) -> Tensor:
    """The same by the rows of active neurons; weights (H * N, D) both."""
    H, B, _, P, D = sums.shape
    borders = torch.arange(H * B, device=s.device)  # rows are grouped by head and sample
    s = s.view(H * B, 2 * P)
    place, pair = (s[:, :P] + s[:, P:]).nonzero().unbind(1)
    members = s[place, pair], s[place, P + pair]
    r = torch.stack(_turned(members, (angles[0][pair], angles[1][pair])), 1).view(-1)
    rows = place * (2 * P) + pair
    rows = torch.stack((rows, rows + P), 1).view(-1)
    table, starts = sums.view(-1, D), 2 * torch.searchsorted(place, borders)
    a = F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=r)
    seen = x.to(table.dtype)
    seen = seen if B == 1 else seen[place % B].repeat_interleave(2, 0)
    table.index_add_(0, rows, r[:, None] * seen)

    a = F.layer_norm(a, (D,)).to(weights[0].dtype)
    place, neuron = s.nonzero().unbind(1)
    rows, starts = place // B * (2 * P) + neuron, torch.searchsorted(place, borders)
    y = torch.einsum("nd,nd->n", weights[0][rows], a[place]).relu_()
    z = (s[place, neuron] * y).to(weights[1].dtype)
    out = F.embedding_bag(rows, weights[1], starts, mode="sum", per_sample_weights=z)
    return out.view(H, B, D).sum(0)


def _turned(members: Sequence[Tensor], angles: Pair) -> Pair:
    (first, second), (cos, sin) = members, angles
    return first * cos - second * sin, second * cos + first * sin
