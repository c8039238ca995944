"""All layers of BDH as one autograd function, which keeps no tensors as wide as all neurons.

The plain formulas make (B, T, H * N) tensors, 128 times as wide as the residual stream, about six
per layer, and keep them for backward: time goes to reading and writing memory. Here the neurons of
a head are taken a tile at a time, small enough for the caches. What is left of a tile is added to
sums of width C or D, and backward computes the tiles again.

B batch, T tokens, D = n_embd, H heads, N neurons per head; X chunks of C tokens in all sequences,
M = X * C tokens, g heads at once, n neurons in a tile. Products run in the dtype of autocast, sums
over tiles in float32 at least.

Letters whose name in the code is another one:

    E, G, W   encoder (D, N), encoder_v (D, N) and decoder (N, D) of a head
    S         scores
    P         states: P_k, (N, D), is the state before chunk k
    dP        dstates: dP_k is the gradient of the state after chunk k, P_(k+1)
    mask      the dropout mask
    r_i, x_i  row i of r and x, a token (u is no index: it is the pre-activation of s = relu(u))


Forward, for one head (`forward.py`)

    F1  u = x E, r = rope(relu(u))            (M, n) per tile
    F2  S = r r^T, 0 where hidden             (C, C) per chunk, summed over tiles
    F3  c = S x + r P                         (C, D) per chunk; r P is summed over tiles
    F4  a = LN(c)                             (M, D)
    F5  v = a G                               (M, n) per tile
    F6  z = relu(u) * relu(v) * mask          (M, n) per tile
    F7  y = sum over heads of z W             (M, D), summed over tiles
        x = LN(x + LN(y))                     (M, D)

Contexts longer than about 4 D tokens are cut into chunks. What comes before a chunk is the state
P = sum of r_i x_i^T, so that time and memory are linear in T.


Backward, for one head (`backward.py`). Six products with weights: B1 to B4, B9 and B10

    round 1 over the tiles: u and v are recomputed (F1, F5)
        B1  dz = dy W^T                       (M, n)
            dv = dz * mask * relu(u) * [v > 0],   du = dz * mask * relu(v) * [u > 0]
        B2  dW = z^T dy                       (n, D)
        B3  dG = a^T dv                       (D, n)
        B4  da = dv G^T                       (M, D), summed over tiles
    between the rounds, since the norm needs all of da
        B5  dc = the backward pass of LN      (M, D)
        B6  dx = S^T dc                       (M, D)
        B7  dS = dc x^T, 0 where hidden       (C, C)
    round 2 over the tiles: u and du are cached, or else recomputed
        B8  dr = (dS + dS^T) r                (M, n): queries are keys, so r gets both gradients
            du += rope^T(dr) * [u > 0]
        B9  dE = x^T du                       (D, n)
        B10 dx += du E^T                      (M, D), summed over tiles

With chunks B8 also has dr += dc P^T + x dP^T, and dx += r dP.


What is kept from forward to backward, per layer: x and y (M, D) in float32; for each head S (M, C)
and a (M, D) in the dtype of products, and the inverse deviation of its norm. At D 256, H 4, N 8192
and 512 tokens in bfloat16 that is 8 kB per token, where six wide tensors would be 390 kB. With
`recompute` only x is kept, 1 kB, and backward begins with the layer's forward pass: 3 products with
weights more, and the same numbers, since dropout masks are hashes.

What it costs: a layer needs 9 products with weights, 3 forward and 6 backward; computing u and v
again makes 2 more. That holds if u and du of all tiles of a head group fit in two buffers
(`Tiling.cache_tiles`). They are the only activations as wide as that group's neurons, and all
layers share them. If they do not fit, u is computed twice in forward, and u, v and dz twice in
backward: 6 more instead of 2.

On a GPU a tile that fits into the caches would be too small to fill the device, so one tile holds
all neurons, and where its four buffers would be too large, groups of sequences go through all
layers one after another. Only weight gradients are sums over groups (`Tiling`).

Every layer uses the same weights, so one function covers all layers: the weights are cut into tiles
once, and their gradients accumulate in place instead of in n_layer copies that autograd would add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.bdh.backward import LayerBackward, WeightGradients
from model.bdh.forward import LAYER_NORM_EPS, SavedHeads, layer_forward
from model.bdh.tiling import TileWeights, pack
from model.bdh.workspace import LayerStackArgs, Workspace

Weights = tuple[Tensor, Tensor, Tensor]
"""encoder (H, D, N), encoder_v (H, D, N), decoder (H * N, D)."""


# Compilers would trace the loops over tiles and layers into one huge graph. The elementwise work
# between the products is compiled by itself instead, which is all that there is to gain.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types here
def fused_layers(x: Tensor, weights: Weights, args: LayerStackArgs) -> Tensor:
    """Applies all layers with their residuals: x (B, T, D) -> (B, T, D).

    Draws one number from torch's generator if there is dropout, and nothing otherwise.
    """
    trained = torch.is_grad_enabled() and any(w.requires_grad for w in (x, *weights))
    assert args.states is None or not trained, "states have no gradient"
    # On the device, where a CUDA graph draws another seed in each replay.
    seed = torch.randint(2**62, (), device=x.device) if args.dropout else None
    with torch.no_grad():
        packed = _implementation(args).pack(weights, args)

    def layers(x: Tensor, args: LayerStackArgs) -> Tensor:
        inputs = (x, *weights, args, seed, trained, packed)
        result: Tensor = _FusedLayers.apply(*inputs)  # type: ignore[no-untyped-call]
        return result

    # Groups of sequences share nothing but the weights: autograd adds their gradients, and frees
    # the wide buffers of each group before the next one needs them.
    groups = args.tiling.sequence_groups(len(x))
    if len(groups) == 1:
        return layers(x, args)
    return torch.cat([layers(x[g], args.of_sequences(g, x.shape[1])) for g in groups])


def _implementation(args: LayerStackArgs) -> Any:
    """Returns `TiledLayers` or `TritonLayers`."""
    if not args.triton:
        return TiledLayers
    from model.bdh.triton.layers import TritonLayers  # not above: Triton is optional

    return TritonLayers


class _FusedLayers(torch.autograd.Function):
    """The stack of layers with its norms and residuals, around either implementation of a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *weights, args, seed, trained, packed = rest
        layers = _implementation(args)(args, packed, x.shape, seed)
        stream = layers.geo.split(x.to(layers.sum_dtype))
        saved: list[Tensor | None] = []
        for layer in range(args.n_layer):
            y, of_layer = layers.forward(stream, layer, trained and not args.recompute)
            if trained:
                saved += [stream] if args.recompute else [stream, y, *of_layer]
            stream = _norm(stream + _norm(y))
            del y, of_layer
        if saved:
            ctx.save_for_backward(*weights, *saved)
            ctx.args, ctx.seed, ctx.shape, ctx.dtype = args, seed, x.shape, x.dtype
            ctx.packed = packed
            ctx.autocast = _current_autocast(x.device) if args.recompute else None
        output: Tensor = layers.geo.join(stream).to(x.dtype)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        args: LayerStackArgs = ctx.args
        weights, saved = ctx.saved_tensors[:3], list(ctx.saved_tensors[3:])
        implementation = _implementation(args)
        # Autograd frees only what it saved itself, so the packed weights are freed here; with
        # retain_graph a second backward pass packs them anew.
        packed, ctx.packed = ctx.packed or implementation.pack(weights, args), None
        layers = implementation(args, packed, ctx.shape, ctx.seed)
        gradients = layers.weight_gradients(weights)
        per_layer = len(saved) // args.n_layer
        dstream = layers.geo.split(dx.to(layers.sum_dtype))
        for layer in reversed(range(args.n_layer)):
            stream, *rest = saved[-per_layer:]
            del saved[-per_layer:]
            if args.recompute:
                with ctx.autocast:  # 8-bit products on a CPU depend on it
                    y, of_layer = layers.forward(stream, layer, True)
            else:
                y, *of_layer = rest
            dsum = _norm_backward(dstream, stream + _norm(y))
            dy = _norm_backward(dsum, y)
            dstream = layers.backward(stream, dy, layer, of_layer, gradients).add_(dsum)
        dx = layers.geo.join(dstream).to(ctx.dtype)
        return dx, *gradients.cast_like(weights), None, None, None, None


class TiledLayers:
    """Layers of matmuls by a backend and elementwise operations, tile by tile.

    `model.bdh.triton.layers.TritonLayers` has the same methods.
    """

    def __init__(
        self,
        args: LayerStackArgs,
        tiles: list[TileWeights],
        x_shape: torch.Size,
        seed: Tensor | None,
    ) -> None:
        self._ws = Workspace(args, tiles, x_shape, seed)
        self.geo, self.sum_dtype = self._ws.geo, self._ws.sum_dtype

    @staticmethod
    def pack(weights: Sequence[Tensor], args: LayerStackArgs) -> list[TileWeights]:
        """Returns the weights for `__init__`; called once for all groups of sequences."""
        dtype, backend = args.rotation.cos.dtype, args.backend
        return list(pack(weights, dtype, args.tiling.pairs, backend.weight))

    def forward(self, stream: Tensor, layer: int, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Returns the layer's output before its norm and residual, (X, C, D), and what backward
        needs; stream (X, C, D). keep: whether backward will take it (for `TritonLayers`)."""
        y, of_heads = layer_forward(self._ws, stream, layer)
        return y, [part for heads in of_heads for part in heads]

    def weight_gradients(self, weights: Sequence[Tensor]) -> WeightGradients:
        """Returns empty sums, to which `backward` adds."""
        return WeightGradients(weights, self.sum_dtype, self._ws.args)

    def backward(
        self,
        stream: Tensor,
        dy: Tensor,
        layer: int,
        saved: list[Tensor],
        gradients: WeightGradients,
    ) -> Tensor:
        """Returns the gradient of the stream (X, C, D) by way of the layer; dy (X, C, D) is that of
        the layer's output. Empties `saved`, to free memory early."""
        of_heads = [SavedHeads(*saved[i : i + 3]) for i in range(0, len(saved), 3)]
        saved.clear()
        dx = LayerBackward(self._ws, stream, dy, layer, gradients).run(of_heads)
        gradients.is_first_layer = False
        return dx


def _current_autocast(device: torch.device) -> torch.autocast:
    """Returns a context with the autocast that is on now: backward runs without it."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _norm_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of x from the gradient of _norm(x)."""
    shape = x.shape[-1:]
    _, mean, inverse_std = torch.native_layer_norm(x, shape, None, None, LAYER_NORM_EPS)
    result: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient, x, shape, mean, inverse_std, None, None, [True, False, False]
    )[0]
    return result
