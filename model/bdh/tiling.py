"""How BDH's work is cut into pieces: chunks of tokens, tiles of neurons, and what belongs to each.

B sequences of T tokens -> X = B * K chunks of C tokens; H heads, `group` of them at once;
N neurons of a head -> tiles of n = 2p, the first members of p rotated pairs, then the second
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROPE_THETA = 2.0**16
_CPU_TILE = 2**22  # elements: a few tiles of them fit the second-level caches and their neighbours
_GPU_TILE = 2**26  # enough to fill the device with one product
_CPU_KEPT, _GPU_KEPT = 2**28, 2**32  # bytes of a buffer kept between the rounds; there are two


class Rotation(NamedTuple):
    """Cosine and sine of the angles: of each token in a chunk, and of a whole chunk."""

    cos: Tensor  # (C, N/2), in the dtype of the products
    sin: Tensor
    chunk_cos: Tensor  # (N/2,), in float32 at least
    chunk_sin: Tensor


def rope_frequencies(neurons: int) -> Tensor:
    """Turns per token of each pair (N/2,) of a new model: theta ** (-2i/N) / (2 pi), in float64."""
    exponent = torch.arange(0, neurons, 2, dtype=torch.float64) / neurons
    return ROPE_THETA**-exponent / (2 * math.pi)


def rotation(frequencies: Tensor, chunk: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    """The angles of a chunk of tokens, for products in this dtype; frequencies in float64, (N/2,).

    Phases are counted in turns and reduced modulo one before the cosine: at large positions the
    angle itself would have no digits left after the point.
    """
    tokens = torch.arange(chunk + 1, dtype=torch.float64)
    angles = torch.outer(tokens, frequencies).remainder(1.0) * (2 * math.pi)
    cos, sin = angles.cos(), angles.sin()
    exact = torch.promote_types(dtype, torch.float32)
    ends = (part[-1].to(device, exact) for part in (cos, sin))
    return Rotation(cos[:-1].to(device, dtype), sin[:-1].to(device, dtype), *ends)


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: chunks of `chunk` tokens, `group` heads at once, tiles of at most
    `pairs` rotated pairs. `keep`: the tiles of a head stay for the second round over its neurons
    instead of being computed again.
    """

    chunk: int
    group: int
    pairs: int
    keep: bool

    def padded(self, length: int) -> int:
        """The tokens of all chunks of a sequence."""
        return -(-length // self.chunk) * self.chunk

    @staticmethod
    def of(
        tokens: tuple[int, int], shape: tuple[int, int, int], dtype: torch.dtype, on_cpu: bool
    ) -> Tiling:
        """What measured fastest for so many tokens, (B, T), and encoders of this shape, (H, D, N).

        The sizes for other devices than CPUs are reasoned, not measured.
        """
        batch, length = tokens
        H, D, N = shape
        longest = max(2 * D, 256)
        chunk = length
        if length > 2 * longest:  # a square of two chunks costs what the state between them does
            chunk = min(longest, -(-length // -(-length // longest) // 32) * 32)
        padded = batch * -(-length // chunk) * chunk
        group = H
        if on_cpu:  # as many heads as one tile has room for
            fitting = max(1, _CPU_TILE // (padded * N))
            group = max(g for g in range(1, H + 1) if H % g == 0 and g <= fitting)
        neurons = (_CPU_TILE if on_cpu else _GPU_TILE) // (padded * group)
        pairs = min(max(neurons, 1024) // 2, N // 2)
        kept = group * padded * N * dtype.itemsize
        return Tiling(chunk, group, pairs, kept <= (_CPU_KEPT if on_cpu else _GPU_KEPT))


def layers_bytes(
    tokens: tuple[int, int],
    shape: tuple[int, int, int],
    tiling: Tiling,
    dtype: torch.dtype,
    beside: int,
) -> tuple[int, int, int]:
    """Memory of the layers besides weights and gradients: (all of them, each of them, backward's).

    What all share and what each keeps is there from forward on; backward needs its own at the last
    layer, when all of that still is. `beside`: bytes per element of a tile that masks or operands
    take for a moment.
    """
    H, D, N = shape
    X, C, g = tokens[0] * tiling.padded(tokens[1]) // tiling.chunk, tiling.chunk, tiling.group
    M, half = X * C, dtype.itemsize
    full = max(half, 4)  # of sums
    n = 2 * max(end - start for start, end in tile_borders(N, tiling.pairs))
    packed = 3 * H * D * N * half
    kept = 2 * M * D * full + H * (M * C * half + M * D * half + M * full)
    wide = (2 * N + 2 * n if tiling.keep else 4 * n) * g * M * half
    streams = M * D * (2 * full + 3 * half) + g * M * D * (2 * full + 2 * half)
    squares = 2 * g * M * C * half
    states = 2 * g * X * n * D * half if tokens[0] < X else 0
    products = g * max(M, n) * D * (half + full)
    return packed, kept, wide + streams + max(beside * g * M * n, squares + states + products)


class Tile(NamedTuple):
    """The weights of some pairs of every head, ready for products."""

    encoder: Any  # (H, D, n)
    encoder_v: Any  # (H, D, n)
    decoder: Any  # (H, n, D)


def tile_borders(neurons: int, pairs: int) -> list[tuple[int, int]]:
    """The pairs of each tile: as few tiles as `pairs` allows, as equal as can be in eights."""
    unit = 8 if neurons % 16 == 0 and pairs >= 8 else 1
    units, most = neurons // 2 // unit, pairs // unit
    count = -(-units // most)
    ends = [units * i // count * unit for i in range(count + 1)]
    return list(itertools.pairwise(ends))


def pack(
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    pairs: int,
    ready: Callable[[Tensor, str], object],
) -> Iterator[Tile]:
    """The weights cut into tiles of this dtype; `ready` makes operands of them by their names."""
    encoder, encoder_v, decoder = weights
    H, D, N = encoder.shape
    for start, end in tile_borders(N, pairs):
        parts = [w.view(H, D, 2, N // 2)[..., start:end] for w in (encoder, encoder_v)]
        parts.append(decoder.view(H, 2, N // 2, D)[:, :, start:end])
        packed = [torch.empty(p.shape, dtype=dtype, device=p.device).copy_(p) for p in parts]
        yield Tile(
            ready(packed[0].view(H, D, -1), "encoder"),
            ready(packed[1].view(H, D, -1), "encoder_v"),
            ready(packed[2].view(H, -1, D), "decoder"),
        )


class ChunkMasks:
    """Who may see whom: hidden (1 or X, C, C), true where it may not.

    With documents also, for each token (X, C, 1), whether its document began before the chunk
    (`enters`) and whether it goes on to the chunk's end (`leaves`); and for each chunk,
    (K, B, 1, 1), whether one document covers it and reaches back before it (`carried`).
    """

    def __init__(
        self, documents: Tensor | None, cut: tuple[int, int, int], device: torch.device
    ) -> None:
        B, K, C = cut
        self.hidden = torch.ones(1, C, C, dtype=torch.bool, device=device).triu()
        self.enters = self.leaves = self.carried = None
        if documents is None:
            return
        missing = K * C - documents.shape[1]
        numbers = torch.cat((documents, documents[:, -1:].expand(B, missing)), 1).view(B, K, C)
        own = numbers[..., None] == numbers[..., None, :]
        self.hidden = self.hidden | ~own.view(B * K, C, C)
        last = numbers[..., -1:]
        before = torch.cat((numbers[:, :1, :1], last[:, :-1]), 1)
        self.enters = (numbers == before).view(B * K, C, 1)
        self.leaves = (numbers == last).view(B * K, C, 1)
        self.carried = (last == before).view(B, K, 1, 1).transpose(0, 1)  # (K, B, 1, 1)
