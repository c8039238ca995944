"""What forward and backward of a layer have in common: buffers, masks and the steps of both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.bdh.elementwise import ElementwiseOps
from model.bdh.masks import ChunkMasks, DropoutMask, HashDropout
from model.bdh.tiling import Geometry, Rotation, TileWeights, Tiling
from model.matmul import Accumulator, MatmulBackend, PlainMatmul


@dataclass(frozen=True)
class LayerStackArgs:
    """What a pass over the layers is given besides x and the weights.

    documents: (B, T), a number per document; tokens attend within their own document only.
    states: (n_layer, H, B, 2, N/2, D), the sums of r_i x_i^T before the first token, rotated to its
    position; replaced by the sums rotated to the position after the last chunk. Without gradients.
    active: (n_layer, 2), to which the numbers of positive u and z are added.
    first_token: the number of tokens in the sequences of the batch that come before these.
    recompute: whether a layer keeps its input alone for backward, and is computed again there.
    triton: whether Triton kernels (`model.bdh.triton`) compute. They ignore ops and backend, and
    there are no states and active then.
    """

    n_layer: int
    dropout: float
    rotation: Rotation
    tiling: Tiling
    ops: ElementwiseOps
    documents: Tensor | None = None
    states: Tensor | None = None
    active: Tensor | None = None
    backend: MatmulBackend = field(default_factory=PlainMatmul)
    first_token: int = 0
    recompute: bool = False
    triton: bool = False

    def of_sequences(self, rows: slice, length: int) -> LayerStackArgs:
        """Returns the arguments for some sequences of the batch, of this length."""
        return replace(
            self,
            documents=None if self.documents is None else self.documents[rows],
            states=None if self.states is None else self.states[:, :, rows],
            first_token=rows.start * length,
        )

    def hash_dropout(
        self, seed: Tensor | None, geo: Geometry, device: torch.device
    ) -> HashDropout | None:
        """Returns the dropout of all layers; None without a seed, () int64."""
        if seed is None:
            return None
        return HashDropout(self.dropout, seed, self.n_layer, geo, device, self.first_token)


class TileBuffers:
    """Memory for tiles, reused for all heads and layers; allocated at first use.

    It is one buffer for all tiles, or with `separate` one for each. Freshly allocated memory of
    such sizes comes from the system page by page: elementwise work on it ran at 2 to 7 GB/s.
    """

    def __init__(
        self, geo: Geometry, dtype: torch.dtype, device: torch.device, separate: bool = False
    ) -> None:
        self._geo, self._dtype, self._device, self._separate = geo, dtype, device, separate
        self._storages: dict[int, Tensor] = {}

    def __getitem__(self, tile: int) -> Tensor:
        """Returns the buffer of a tile, (g, M, n)."""
        geo, number = self._geo, tile if self._separate else 0
        rows = geo.g * geo.M
        if number not in self._storages:
            widest = max(geo.neurons(i) for i in range(len(geo.tiles)))
            storage = torch.empty(rows * widest, dtype=self._dtype, device=self._device)
            self._storages[number] = storage
        # Every tile begins where the storage does, as `elementwise.compiled_ops` needs it.
        return self._storages[number][: rows * geo.neurons(tile)].view(geo.g, geo.M, -1)


class Workspace:
    """The weights, buffers and masks of one pass over the layers, forward or backward."""

    def __init__(
        self,
        args: LayerStackArgs,
        weights: list[TileWeights],
        x_shape: torch.Size,
        seed: Tensor | None,
    ) -> None:
        H, N = len(weights[0].encoder), 2 * len(args.rotation.chunk_cos)
        self.args, self.weights, self.ops, self.backend = args, weights, args.ops, args.backend
        self.geo = geo = Geometry.of(x_shape, H, N, args.tiling)
        self.dtype, self.device = args.rotation.cos.dtype, args.rotation.cos.device
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        self.masks = ChunkMasks(args.documents, (geo.B, geo.K, geo.C), self.device)
        self.has_states = geo.K > 1 or args.states is not None
        self._dropout = args.hash_dropout(seed, geo, self.device)
        self.dropout_scale = self._dropout.scale if self._dropout else 1.0

        shared = geo, self.dtype, self.device
        self.u = TileBuffers(*shared, separate=args.tiling.cache_tiles)
        self.du = TileBuffers(*shared, separate=args.tiling.cache_tiles)
        # These two buffers have two names each: a tile is either in the attention, which needs r
        # and dr, or in the gate, which needs v and dz. Buffers of their own would be two more tiles
        # in memory and in the caches. Writing `ws.r[tile]` therefore destroys `ws.v[tile]`, and the
        # other way round. The gate uses them once more: it writes z over v, and dv over dz.
        self.v = self.r = TileBuffers(*shared)
        self.dz = self.dr = TileBuffers(*shared)

    def accumulator(self, *shape: int) -> Accumulator:
        """Returns an empty sum, in float32 at least."""
        total = torch.empty(shape, dtype=self.sum_dtype, device=self.device)
        return Accumulator(total, self.ops.add)

    def dropout_mask(self, layer: int, heads: slice, tile: int) -> DropoutMask | None:
        """Returns what dropout keeps of a tile; None without dropout."""
        if self._dropout is None:
            return None
        return self._dropout.mask(layer, heads, self.geo.tiles[tile])

    def cos_sin(self, tile: int) -> tuple[Tensor, Tensor]:
        """Returns the rotation of a tile's pairs at each token of a chunk, (C, p) each."""
        pairs, rotation = self.geo.tiles[tile], self.args.rotation
        return rotation.cos[:, pairs], rotation.sin[:, pairs]

    def initial_states(self, layer: int, heads: slice, tile: int) -> Tensor | None:
        """Returns the part of `args.states` that belongs to a tile, (g, B, 2, p, D)."""
        if self.args.states is None:
            return None
        return self.args.states[layer, heads, :, :, self.geo.tiles[tile]]
