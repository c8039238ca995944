"""BDH's layers, forward and backward, without ever holding a tensor as wide as all its neurons.

The plain formulas write (B, T, H * N) tensors, 128 times as wide as the residual stream, about six
per layer, and keep them for backward: their time goes to memory. Here each head's neurons are taken
a tile at a time, small enough for the cache; what is left of a tile is added to the scores (C, C),
to the layer's output (D) or to a weight's gradient. Backward computes the tiles again.

Contexts longer than a few times D are cut into chunks of C tokens. Within a chunk the scores are a
square; what came before it is a state of (N, D) per head: the sum of r_u x_u^T. Rotation depends on
the distance alone, so positions count from the start of a chunk and the state turns back by C
tokens at each border. Time and memory are linear in T.

Every layer uses the same weights, so one autograd function covers all layers: the gradients of the
weights accumulate in place. Products run in the dtype of autocast, sums over tiles in float32 at
least.

    g heads at once, X = B * K sequences cut into K chunks of C tokens, M = X * C,
    n = 2p neurons in a tile, the first members of p rotated pairs and then the second
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.bdh.elementwise import Keep, Passes, hashed
from model.bdh.tiling import ChunkMasks, Rotation, Tile, Tiling, pack, tile_borders
from model.matmul import Accumulator, MatmulBackend, OperandId, PlainMatmul

_EPS = 1e-5  # of layer norm
_SALT = 0x5DEECE66D  # tells the hashes of neurons from those of tokens

Weights = tuple[Tensor, Tensor, Tensor]
"""encoder (H, D, N), encoder_v (H, D, N), decoder (H * N, D)."""


@dataclass(frozen=True)
class Call:
    """What a run over the layers is given besides tokens and weights.

    documents: (B, T) numbers, none used again; tokens see their own document only.
    states: (n_layer, H, B, 2, N/2, D), the sum of r_u x_u^T before the first token, turned to its
    position; replaced by the sum turned to the position after the last chunk.
    active: (n_layer, 2), where positive s and z are counted.
    """

    n_layer: int
    dropout: float
    rotation: Rotation
    tiling: Tiling
    passes: Passes
    documents: Tensor | None = None
    states: Tensor | None = None
    active: Tensor | None = None
    backend: MatmulBackend = field(default_factory=PlainMatmul)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the passes are compiled, not this
def bdh_layers(x: Tensor, weights: Weights, call: Call) -> Tensor:
    """All layers with their residuals: x (B, T, D) -> (B, T, D).

    Draws one number from torch's generator where there is dropout, and nothing otherwise.
    """
    trained = torch.is_grad_enabled() and any(w.requires_grad for w in (x, *weights))
    assert call.states is None or not trained, "states have no gradient"
    seed = int(torch.randint(2**62, ()).item()) if call.dropout else 0
    inputs = (x, *weights, call, seed, trained)
    result: Tensor = _Layers.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *weights, call, seed, trained = rest
        tiles = _tiles(weights, call)
        layer = _Layer(x.shape, tiles, call, seed)
        stream = layer.cut(x.to(layer.sum_dtype))
        saved: list[Tensor] = []
        for number in range(call.n_layer):
            y, kept = layer.forward(stream, number)
            if trained:
                saved += [stream, y, *kept]
            stream = _norm(stream + _norm(y))
            del y, kept
        if saved:
            ctx.save_for_backward(*weights, *saved)
            ctx.call, ctx.seed, ctx.shape, ctx.dtype = call, seed, x.shape, x.dtype
            ctx.tiles = tiles
            ctx.per_layer = len(saved) // call.n_layer
        return layer.join(stream).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        weights, saved = ctx.saved_tensors[:3], list(ctx.saved_tensors[3:])
        tiles = ctx.tiles or _tiles(weights, call)  # made anew where the graph was retained
        ctx.tiles = None  # autograd frees only what it saved itself
        layer = _Layer(ctx.shape, tiles, call, ctx.seed)
        gradients = _Gradients(weights, layer.sum_dtype, call.passes)
        dstream = layer.cut(dx.to(layer.sum_dtype))
        for number in reversed(range(call.n_layer)):
            stream, y, *kept = saved[-ctx.per_layer :]
            del saved[-ctx.per_layer :]
            dsum = _norm_backward(dstream, stream + _norm(y))
            dy = _norm_backward(dsum, y)
            dstream = layer.backward(stream, dy, kept, number, gradients).add_(dsum)
            gradients.fresh = False
        return layer.join(dstream).to(ctx.dtype), *gradients.like(weights), None, None, None


def _tiles(weights: Sequence[Tensor], call: Call) -> list[Tile]:
    return list(pack(weights, call.rotation.cos.dtype, call.tiling.pairs, call.backend.weight))


class _Gradients:
    """The gradients of the weights, in the weights' own layout, summed over layers."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, passes: Passes) -> None:
        self.shape = weights[0].shape
        self.sums = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
        self.passes, self.fresh = passes, True

    def add(self, name: str, heads: slice, pairs: tuple[int, int], product: Tensor) -> None:
        """Adds (g, D, n) to the columns, or (g, n, D) to the rows, of these pairs of neurons."""
        H, D, N = self.shape
        if name == "decoder":
            rows = self.sums[2].view(H, 2, N // 2, D)[heads, :, slice(*pairs)]
            total = rows.view(2 * len(rows), -1)  # p * D next to one another
        else:
            weight = self.sums[0 if name == "encoder" else 1]
            columns = weight.view(H, D, 2, N // 2)[heads, ..., slice(*pairs)]
            total = columns.view(-1, columns.shape[-1])
        if self.fresh:
            total.copy_(product.view(total.shape))
        else:
            self.passes.add(total, product.view(total.shape))

    def like(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [total.to(w.dtype) for total, w in zip(self.sums, weights, strict=True)]


def _where(mask: Tensor | None, x: Tensor) -> Tensor:
    """x (..., X, C, D) where the mask (X, C, 1) holds, else 0."""
    return x if mask is None else x * mask


class _Attention(NamedTuple):
    """What the second round of backward needs of a group of heads; (g * X, C, ...) all."""

    da: Tensor  # the gradient of a before its norm
    symmetric: Tensor  # of the scores, and of the same scores seen from the keys
    entering: Tensor  # da where a chunk's first document began before it
    leaving: Tensor  # x where its last document goes on
    past: Accumulator | None  # what x gets by way of the states


class _Layer:
    """The one layer that all layers are: its tiles, its buffers, its masks.

    Streams are (X, C, D); what differs by head is (g, M, D) for products over tokens and
    (g * X, C, ...) for products within chunks.
    """

    def __init__(self, shape: torch.Size, tiles: list[Tile], call: Call, seed: int) -> None:
        self.B, self.T, self.D = shape
        self.g, self.C = call.tiling.group, call.tiling.chunk
        self.K = -(-self.T // self.C)
        self.X, self.M = self.B * self.K, self.B * self.K * self.C
        self.H, self.N = len(tiles[0].encoder), 2 * len(call.rotation.chunk_cos)
        self.call, self.tiles, self.passes, self.backend = call, tiles, call.passes, call.backend
        self.borders = tile_borders(self.N, call.tiling.pairs)
        self.dtype, self.device = call.rotation.cos.dtype, call.rotation.cos.device
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        self.masks = ChunkMasks(call.documents, (self.B, self.K, self.C), self.device)
        self.has_past = self.K > 1 or call.states is not None
        dropped = min(round(call.dropout * 2**32), 2**32 - 1)
        self.scale, self.least = 2**32 / (2**32 - dropped), dropped - 2**31
        if call.dropout:
            neurons = torch.arange(self.H * self.N, device=self.device) + (seed ^ _SALT)
            self.columns = hashed(neurons).view(self.H, 2, -1)
            self.rows = self.token_hashes(call.n_layer, seed)
        self.buffers: dict[str, Tensor] = {}

    def token_hashes(self, layers: int, seed: int) -> Tensor:
        """Of each token in each layer, (n_layer, X, C, 1): the same however the tokens are cut."""
        tokens = torch.arange(self.B * self.T, device=self.device).view(1, self.B, self.T)
        keys = tokens + seed + (torch.arange(layers, device=self.device).view(-1, 1, 1) << 40)
        padded = F.pad(hashed(keys), (0, self.K * self.C - self.T))
        return padded.view(layers, self.X, self.C, 1)

    def cut(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (X, C, D); what the last chunk lacks is zero: no neuron is active there."""
        return F.pad(x, (0, 0, 0, self.K * self.C - self.T)).view(self.X, self.C, self.D)

    def join(self, x: Tensor) -> Tensor:
        """(X, C, D) -> (B, T, D)."""
        return x.view(self.B, self.K * self.C, self.D)[:, : self.T]

    def forward(self, x: Tensor, number: int) -> tuple[Tensor, list[Tensor]]:
        """The layer before its residual, and what backward needs of each group of heads:

        scores (g * X, C, C), a after its norm (g, M, D) and the inverse of its deviation (g, M, 1).
        """
        x = x.to(self.dtype)
        rows = self.operand(x, OperandId("x", number), shared=True)
        y = self.sum(self.g, self.M, self.D)
        kept: list[Tensor] = []
        for heads in self.groups():
            scores, past = self.attend(x, rows, heads, number)
            a = torch.bmm(scores, self.chunks(x)).to(self.sum_dtype)
            a = a if past is None else a.add_(past)
            a, _, scale = torch.native_layer_norm(a, (self.D,), None, None, _EPS)
            a = a.to(self.dtype).view(self.g, self.M, self.D)
            rows_a = self.backend.activation(a, OperandId("a", number), shared=True)
            for i, tile in enumerate(self.tiles):
                u = self.encode(rows, heads, i, again=True)
                v = self.backend.forward(rows_a, tile.encoder_v[heads], self.wide("v", i))
                self.passes.gate(self.tokens(u), self.tokens(v), self.keep(number, heads, i))
                if self.call.active is not None:
                    self.call.active[number] += torch.stack([(u > 0).sum(), (v > 0).sum()])
                z = self.backend.activation(v, OperandId("z", number))
                self.backend.forward(z, tile.decoder[heads], y)
            kept += [scores, a, scale.view(self.g, self.M, 1)]
        return y.total.sum(0).mul_(self.scale).view(x.shape), kept

    def attend(
        self, x: Tensor, rows: Any, heads: slice, number: int
    ) -> tuple[Tensor, Tensor | None]:
        """Scores within chunks, (g * X, C, C), and what a gets from before them, (g * X, C, D);
        rows: x as an operand."""
        scores = self.sum(self.g * self.X, self.C, self.C)
        past = self.sum(self.g * self.X, self.C, self.D) if self.has_past else None
        leaving = self.chunks(_where(self.masks.leaves, x))
        for i in range(len(self.tiles)):
            r = self.turned(self.encode(rows, heads, i), "v", i)
            scores.add(r, r.mT)
            if past is not None:
                past.add(r, self.carry(torch.bmm(r.mT, leaving), i, self.states(number, heads, i)))
        scores.total.view(self.g, self.X, self.C, self.C).masked_fill_(self.masks.hidden, 0)
        if past is not None and self.masks.enters is not None:
            past.total.view(self.g, self.X, self.C, self.D).mul_(self.masks.enters)
        return scores.total.to(self.dtype), None if past is None else past.total

    def backward(
        self, x: Tensor, dy: Tensor, kept: list[Tensor], number: int, gradients: _Gradients
    ) -> Tensor:
        """The gradient of x by way of the layer; adds to those of the weights."""
        backend, x = self.backend, x.to(self.dtype)
        rows = self.operand(x, OperandId("x", number), shared=True)
        dy = self.operand(dy.mul(self.scale).to(self.dtype), OperandId("dy", number))
        dx = self.sum(self.g, self.M, self.D)
        for heads in self.groups():
            scores, a, scale = kept.pop(0), kept.pop(0), kept.pop(0)
            da, rows_a = (
                self.sum(self.g, self.M, self.D),
                backend.activation(a, OperandId("a", number), True),
            )
            for i, pairs in enumerate(self.borders):
                z, dv, _ = self.gate_backward((rows, rows_a, dy), (number, heads, i))
                z = backend.activation(z, OperandId("z", number))
                dv = backend.gradient(dv, OperandId("dv", number))
                gradients.add("decoder", heads, pairs, backend.grad_weight(z, dy))
                gradients.add("encoder_v", heads, pairs, backend.grad_weight(rows_a, dv))
                backend.grad_input(dv, self.tiles[i].encoder_v[heads], da)
            attention = self.attention(x, _norm_gradient(da.total, a, scale).to(self.dtype))
            dx.add(scores.mT, attention.da)
            for i, pairs in enumerate(self.borders):
                if self.call.tiling.keep:
                    du = self.wide(f"du{i}", i)
                else:
                    du = self.gate_backward((rows, rows_a, dy), (number, heads, i))[2]
                self.attend_backward(attention, self.encode(rows, heads, i, again=True), du, i)
                du = backend.gradient(du, OperandId("du", number))
                gradients.add("encoder", heads, pairs, backend.grad_weight(rows, du))
                backend.grad_input(du, self.tiles[i].encoder[heads], dx)
            if attention.past is not None:
                past = attention.past.total.view(self.g, self.X, self.C, self.D)
                dx.total.add_(_where(self.masks.leaves, past).view(dx.total.shape))
        return dx.total.sum(0).view(x.shape)

    def gate_backward(
        self, operands: tuple[Any, Any, Any], place: tuple[int, slice, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a tile: z, the gradient of v, and that of u by way of z; each (g, M, n).

        operands: x, a and the gradient of y.
        """
        (x, a, dy), (_, heads, i) = operands, place
        u = self.encode(x, heads, i)
        v = self.backend.forward(a, self.tiles[i].encoder_v[heads], self.wide("v", i))
        dz = self.backend.grad_input(dy, self.tiles[i].decoder[heads], self.wide("dz", i))
        du = self.wide(f"du{i}" if self.call.tiling.keep else "du", i)
        u4, v4, dz4, du4 = (self.tokens(tile) for tile in (u, v, dz, du))
        self.passes.gate_backward(u4, v4, dz4, self.keep(*place), du4)
        return v, dz, du

    def attention(self, x: Tensor, da: Tensor) -> _Attention:
        """What the second round of backward needs of a group of heads; da (g, M, D)."""
        da, x = da.view(-1, self.C, self.D), self.chunks(x)
        dscores = torch.bmm(da, x.mT).view(self.g, self.X, self.C, self.C)
        dscores = dscores.masked_fill_(self.masks.hidden, 0).view(-1, self.C, self.C)
        symmetric = dscores + dscores.mT  # queries are keys
        if not self.has_past:
            return _Attention(da, symmetric, da, x, None)
        streams = (self.g, self.X, self.C, self.D)
        entering = _where(self.masks.enters, da.view(streams)).view(da.shape)
        leaving = _where(self.masks.leaves, x.view(streams)).view(x.shape)
        past = self.sum(self.g * self.X, self.C, self.D)
        return _Attention(da, symmetric, entering, leaving, past)

    def attend_backward(self, attention: _Attention, u: Tensor, du: Tensor, i: int) -> None:
        """Adds to du what comes by way of r, and to `attention.past` what x gets from its state."""
        _, symmetric, entering, leaving, past = attention
        r = self.turned(u, "v", i)
        dr = self.wide("dz", i).view(r.shape)
        torch.bmm(symmetric, r, out=dr)
        if past is not None:
            before = self.carry(torch.bmm(r.mT, leaving), i)
            after = self.carry(torch.bmm(r.mT, entering), i, backward=True)
            dr.baddbmm_(entering, before.mT).baddbmm_(leaving, after.mT)
            past.add(r, after)
        cos, sin = self.angles(i)
        u4, dr4, du4 = (self.tokens(tile) for tile in (u, dr, du))
        self.passes.turn_backward(u4, dr4, cos, sin, du4)

    def encode(self, x: Any, heads: slice, i: int, again: bool = False) -> Tensor:
        """u = x E of a tile, (g, M, n); `again`: what this made is taken where it was kept."""
        kept = self.call.tiling.keep
        u = self.wide(f"u{i}" if kept else "u", i)
        if again and kept:
            return u
        return self.backend.forward(x, self.tiles[i].encoder[heads], u)

    def turned(self, u: Tensor, name: str, i: int) -> Tensor:
        """r of a tile, (g * X, C, n), in the buffer of that name."""
        r = self.wide(name, i)
        self.passes.turn(self.tokens(u), *self.angles(i), self.tokens(r))
        return r.view(self.g * self.X, self.C, -1)

    def carry(
        self, products: Tensor, i: int, state: Tensor | None = None, backward: bool = False
    ) -> Tensor:
        """The state at the border of each chunk, from what each chunk adds: (g * X, n, D) both.

        Forward the state before a chunk, backward the gradient of the state after it. `state`
        (g, B, n, D) is what the first chunk finds, and is replaced by what the last one leaves.
        """
        parts = products.view(self.g, self.B, self.K, -1, self.D)
        start, end = self.borders[i]
        cos = self.call.rotation.chunk_cos[start:end, None]
        sin = self.call.rotation.chunk_sin[start:end, None] * (-1 if backward else 1)
        if state is None:
            now = torch.zeros_like(parts[:, :, 0], dtype=self.sum_dtype)
        else:
            now = state.flatten(2, 3)
        for k in range(self.K - 1, -1, -1) if backward else range(self.K):
            goes_on = None if self.masks.carried is None else self.masks.carried[k]
            now = self.passes.carry(parts[:, :, k], now, goes_on, cos, sin)
        if state is not None:
            state.copy_(now.view(state.shape))
        return products

    def states(self, number: int, heads: slice, i: int) -> Tensor | None:
        """Where the state before the first chunk is kept, (g, B, 2, p, D); None without one."""
        if self.call.states is None:
            return None
        start, end = self.borders[i]
        return self.call.states[number, heads, :, :, start:end]

    def keep(self, number: int, heads: slice, i: int) -> Keep | None:
        """What dropout keeps of a tile; None without dropout."""
        if not self.call.dropout:
            return None
        start, end = self.borders[i]
        columns = self.columns[heads, :, start:end].reshape(self.g, 1, 1, -1)
        return Keep(self.rows[number], columns, self.least)

    def angles(self, i: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of a tile's pairs, (C, p) each."""
        start, end = self.borders[i]
        return self.call.rotation.cos[:, start:end], self.call.rotation.sin[:, start:end]

    def groups(self) -> Iterator[slice]:
        """The heads, `group` at once."""
        return (slice(h, h + self.g) for h in range(0, self.H, self.g))

    def operand(self, x: Tensor, place: OperandId, shared: bool = False) -> Any:
        """(X, C, D), the same for all heads, as an operand; gradients have a name with d."""
        flat = x.view(1, self.M, self.D)
        if place[0] == "dy":
            return self.backend.gradient(flat, place)
        return self.backend.activation(flat, place, shared)

    def chunks(self, x: Tensor) -> Tensor:
        """(..., C, D), the same for all heads -> (g * X, C, D)."""
        return x.expand(self.g, self.X, self.C, self.D).reshape(-1, self.C, self.D)

    def tokens(self, tile: Tensor) -> Tensor:
        """(g, M, n) or (g * X, C, n) -> (g, X, C, n)."""
        return tile.view(self.g, self.X, self.C, -1)

    def wide(self, name: str, i: int) -> Tensor:
        """The buffer of that name as tile i, (g, M, n)."""
        start, end = self.borders[i]
        return self.buffer(name, self.g * self.M * 2 * (end - start)).view(self.g, self.M, -1)

    def buffer(self, name: str, size: int) -> Tensor:
        if name not in self.buffers:
            most = max(end - start for start, end in self.borders)
            shape = (self.g * self.M * 2 * most,)
            self.buffers[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self.buffers[name][:size]

    def sum(self, *shape: int) -> Accumulator:
        return Accumulator(
            torch.empty(shape, dtype=self.sum_dtype, device=self.device), self.passes.add
        )


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _norm_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, given that of _norm(x)."""
    shape = x.shape[-1:]
    _, mean, scale = torch.native_layer_norm(x, shape, None, None, _EPS)
    result: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient, x, shape, mean, scale, None, None, [True, False, False]
    )[0]
    return result


def _norm_gradient(gradient: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """The same from what the norm gave and the inverse of its deviation."""
    normed = normed.to(gradient.dtype)
    along = (gradient * normed).mean(-1, keepdim=True)
    return (
        (gradient - gradient.mean(-1, keepdim=True)).addcmul_(normed, along, value=-1).mul_(scale)
    )
