"""How BDH's work is cut into pieces: chunks of tokens, groups of sequences and of heads, tiles of
neurons.

B sequences of T tokens -> X = B * K chunks of C tokens; H heads, g of them at once;
N neurons of a head -> tiles of n = 2p: the first members of p rotated pairs, then the second.
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
_CPU_TILE = 2**22  # elements: a few tiles of this size fit in the L2 caches
# The most bytes of u, or of du, of all tiles of a head group that are kept for the second round of
# backward. Beyond it they are computed again.
_CPU_CACHE = 2**28
# Bytes of the four buffers of a tile on other devices: 16,384 tokens of 32,768 neurons in 16 bits,
# more than fills a GPU (reasoned, not measured). No share of the GPU's memory, since sums would
# round differently on another GPU; a further group of sequences costs one sum of gradients.
_GPU_BUFFERS = 2**32
_GPU_STRIP = 128  # rows of scores: the blocks in which cuBLAS computes
_GPU_SCAN = 16  # chunks: beyond it the compiler cuts the scan into many kernels


class Rotation(NamedTuple):
    """Cosine and sine of rope's angles: of each token in a chunk, and of a whole chunk."""

    cos: Tensor  # (C, N/2), in the dtype of the products
    sin: Tensor
    chunk_cos: Tensor  # (N/2,), in float32 at least
    chunk_sin: Tensor


def rope_frequencies(neurons: int) -> Tensor:
    """Returns a new model's frequencies in turns per token, theta ** (-2i/N) / (2 pi): (N/2,) in
    float64 on the CPU."""
    # Not on torch's default device, which may be another one while a model is made.
    exponent = torch.arange(0, neurons, 2, dtype=torch.float64, device="cpu") / neurons
    return ROPE_THETA**-exponent / (2 * math.pi)


def rotation(frequencies: Tensor, chunk: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    """Returns the rotation of a chunk of tokens from frequencies (N/2,) in float64.

    dtype: of the products.
    """
    tokens = torch.arange(chunk + 1, dtype=torch.float64, device="cpu")
    # Phases are in turns and reduced modulo one before the cosine: at large positions the angle
    # itself would have no digits left after the point.
    angles = torch.outer(tokens, frequencies).remainder(1.0) * (2 * math.pi)
    cos, sin = angles.cos(), angles.sin()
    exact = torch.promote_types(dtype, torch.float32)
    whole = (part[-1].to(device, exact) for part in (cos, sin))
    return Rotation(cos[:-1].to(device, dtype), sin[:-1].to(device, dtype), *whole)


@dataclass(frozen=True)
class Tiling:
    """The sizes of the pieces."""

    chunk: int
    """Tokens of a chunk."""
    group: int
    """Heads that are computed together."""
    pairs: int
    """The most rotated pairs in a tile."""
    cache_tiles: bool
    """Whether backward keeps u and du of all tiles of a head group for its second round. If so,
    these two buffers do hold all neurons of the group."""
    sequences: int | None = None
    """The most sequences that go through the layers together; None: all."""
    strip: int | None = None
    """Rows of scores computed by one product, with the columns up to the last row only: scores are
    causal, so narrow strips need about half the FLOPs. None: all rows of a chunk."""
    scan: int = 1
    """The most chunks whose states are computed by one operation, instead of one after another."""
    gradients_in_products: bool = False
    """Whether a product adds its weight gradient to those of other layers itself, with one rounding
    less, instead of a pass after it. Only where one tile holds all neurons."""
    kept_layers: int = 0
    """Triton kernels only: the most layers that keep s and r for backward; the others recompute."""

    def padded(self, length: int) -> int:
        """Returns the number of tokens rounded up to whole chunks."""
        return -(-length // self.chunk) * self.chunk

    def sequence_groups(self, batch: int) -> list[slice]:
        """Returns the groups of sequences that go through the layers together, equal but for the
        last."""
        count = -(-batch // (self.sequences or batch))
        size = -(-batch // count)
        return [slice(first, min(first + size, batch)) for first in range(0, batch, size)]

    @staticmethod
    def of(
        tokens: tuple[int, int], shape: tuple[int, int, int], dtype: torch.dtype, on_cpu: bool
    ) -> Tiling:
        """Returns the tiling for tokens (B, T) and encoders of this shape, (H, D, N): the fastest
        that was measured on CPUs, a reasoned one for other devices."""
        batch, length = tokens
        H, D, N = shape
        chunk = chunk_tokens(length, D, 32)
        padded = -(-length // chunk) * chunk
        if on_cpu:
            return Tiling._of_cpu(chunk, batch * padded, H, N, dtype)
        return Tiling._of_gpu(chunk, padded, H, N, dtype)

    @staticmethod
    def _of_cpu(chunk: int, rows: int, H: int, N: int, dtype: torch.dtype) -> Tiling:
        """Tiles that fit into the caches, of as many heads as fit in one tile. rows: M."""
        group = _largest_divisor(H, _CPU_TILE // (rows * N))
        pairs = min(max(_CPU_TILE // (rows * group), 1024) // 2, N // 2)
        return Tiling(chunk, group, pairs, group * rows * N * dtype.itemsize <= _CPU_CACHE)

    @staticmethod
    def _of_gpu(chunk: int, padded: int, H: int, N: int, dtype: torch.dtype) -> Tiling:
        """One tile of all neurons where memory allows: a tile that fits into a GPU's caches does
        not fill the GPU, and each further tile adds a pass over sums. Where memory does not allow
        it, sequences are cut before heads and heads before neurons, since fewer sums go over them.
        Reasoned, not measured. padded: tokens of a sequence in whole chunks.
        """
        of_neuron = 4 * padded * dtype.itemsize  # bytes in a sequence
        fitting = _GPU_BUFFERS // (of_neuron * N)  # heads
        return Tiling(
            chunk,
            group=_largest_divisor(H, fitting),
            pairs=min(max(_GPU_BUFFERS // of_neuron, 1024), N) // 2,
            cache_tiles=fitting > 0,  # the buffers are there
            sequences=max(1, fitting // H),
            strip=_GPU_STRIP,
            scan=_GPU_SCAN,
            gradients_in_products=True,
        )


def longest_chunk(width: int) -> int:
    """Returns the most tokens of a chunk, where contexts are cut into chunks."""
    # Scores cost C per token, states between chunks 2 D: a chunk of about 2 D balances them.
    return max(2 * width, 256)


def chunk_tokens(length: int, width: int, unit: int) -> int:
    """Returns the chunk that a context is cut into: all of it up to twice the longest chunk, else
    one of several equal chunks, a multiple of `unit`."""
    longest = longest_chunk(width)
    if length <= 2 * longest:
        return length
    return min(longest, -(-length // -(-length // longest) // unit) * unit)


def _largest_divisor(heads: int, most: int) -> int:
    """Returns the largest number of heads up to `most` that divides them; 1 at least."""
    return max(g for g in range(1, heads + 1) if heads % g == 0 and g <= max(1, most))


@dataclass(frozen=True)
class Geometry:
    """All sizes of one pass over the layers, and views of tensors by them."""

    B: int  # sequences
    T: int  # tokens of a sequence
    D: int  # width of the residual stream
    H: int  # heads
    N: int  # neurons of a head
    C: int  # tokens of a chunk
    K: int  # chunks of a sequence
    X: int  # chunks of all sequences
    M: int  # tokens of all chunks, with padding
    g: int  # heads at once
    tiles: tuple[slice, ...]  # of the N/2 pairs of a head
    strips: tuple[slice, ...]  # of the C rows of scores

    @staticmethod
    def of(x_shape: torch.Size, H: int, N: int, tiling: Tiling) -> Geometry:
        """Returns the sizes for x of shape (B, T, D)."""
        (B, T, D), C = x_shape, tiling.chunk
        K, height = -(-T // C), tiling.strip or C
        tiles = tile_pairs(N, tiling.pairs)
        strips = tuple(slice(row, min(row + height, C)) for row in range(0, C, height))
        return Geometry(B, T, D, H, N, C, K, B * K, B * K * C, tiling.group, tiles, strips)

    def head_groups(self) -> Iterator[slice]:
        """Yields the heads, g at once."""
        return (slice(h, h + self.g) for h in range(0, self.H, self.g))

    def neurons(self, tile: int) -> int:
        """Returns n, the neurons of a tile in one head."""
        pairs = self.tiles[tile]
        return 2 * int(pairs.stop - pairs.start)

    def split(self, x: Tensor) -> Tensor:
        """Cuts (B, T, D) into chunks (X, C, D). Padding is zero, where no neuron is active."""
        pad = self.K * self.C - self.T
        return torch.nn.functional.pad(x, (0, 0, 0, pad)).view(self.X, self.C, self.D)

    def join(self, x: Tensor) -> Tensor:
        """Puts chunks (X, C, D) together to (B, T, D)."""
        return x.view(self.B, self.K * self.C, self.D)[:, : self.T]

    def by_chunk(self, x: Tensor) -> Tensor:
        """Views (g, X, C, ...) or (g, M, ...) as (g * X, C, ...), for products within chunks."""
        return x.view(self.g * self.X, self.C, -1)

    def by_head(self, x: Tensor) -> Tensor:
        """Views (g, M, ...) or (g * X, C, ...) as (g, X, C, ...), for elementwise work."""
        return x.view(self.g, self.X, self.C, -1)

    def as_rows(self, x: Tensor) -> Tensor:
        """Views (X, C, D), which all heads share, as (1, M, D), for products with weights."""
        return x.view(1, self.M, self.D)

    def repeat_heads(self, x: Tensor) -> Tensor:
        """Copies (X, C, D), which all heads share, for each head: (g * X, C, D)."""
        return x.expand(self.g, self.X, self.C, self.D).reshape(-1, self.C, self.D)


class TileWeights(NamedTuple):
    """The weights of some pairs of neurons of every head, as operands of a matmul backend."""

    encoder: Any  # (H, D, n)
    encoder_v: Any  # (H, D, n)
    decoder: Any  # (H, n, D)


def tile_pairs(neurons: int, pairs: int) -> tuple[slice, ...]:
    """Returns the pairs of each tile: as few tiles of at most `pairs` as possible, of nearly equal
    size, in multiples of 8 pairs where that divides the neurons."""
    unit = 8 if neurons % 16 == 0 and pairs >= 8 else 1
    units, most = neurons // 2 // unit, pairs // unit
    count = -(-units // most)
    ends = [units * i // count * unit for i in range(count + 1)]
    return tuple(slice(start, end) for start, end in itertools.pairwise(ends))


def pack(
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    pairs: int,
    as_operand: Callable[[Tensor, str], object],
) -> Iterator[TileWeights]:
    """Yields the weights tile by tile, copied to contiguous memory in this dtype.

    A slice of (H, D, N) has rows of n numbers far apart; matmuls of packed tiles run at full speed,
    and the copy is made once for all layers.
    """
    encoder, encoder_v, decoder = weights
    H, D, N = encoder.shape
    for tile in tile_pairs(N, pairs):
        parts = [w.view(H, D, 2, N // 2)[..., tile] for w in (encoder, encoder_v)]
        parts.append(decoder.view(H, 2, N // 2, D)[:, :, tile])
        packed = [torch.empty(p.shape, dtype=dtype, device=p.device).copy_(p) for p in parts]
        yield TileWeights(
            as_operand(packed[0].view(H, D, -1), "encoder"),
            as_operand(packed[1].view(H, D, -1), "encoder_v"),
            as_operand(packed[2].view(H, -1, D), "decoder"),
        )
