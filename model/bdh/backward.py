"""One BDH layer backward, tile by tile; the steps B1 to B10 are those of `fused_layers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.bdh.forward import SavedHeads, encode, masked, rotate, scan_chunk_states
from model.bdh.workspace import LayerStackArgs, Workspace
from model.matmul import Accumulator, OperandId


class WeightGradients:
    """The gradients of the three weights in the weights' own layout, summed over layers."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, args: LayerStackArgs) -> None:
        self._shape = weights[0].shape
        self._sums = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
        self._add, self._backend = args.ops.add, args.backend
        self._in_products = args.tiling.gradients_in_products
        self.is_first_layer = True  # whose gradients are copied instead of added to zeros

    def add(
        self,
        name: Literal["encoder", "encoder_v", "decoder"],
        heads: slice,
        pairs: slice,
        x: Any,
        gradient: Any,
    ) -> None:
        """Adds the product x^T gradient, of operands of the backend: (g, D, n) to columns of an
        encoder, or (g, n, D) to rows of the decoder."""
        H, D, N = self._shape
        total = self._sums[("encoder", "encoder_v", "decoder").index(name)]
        if self._in_products and pairs == slice(0, N // 2):
            of_heads = total.view(H, -1, D if name == "decoder" else N)[heads]
            whole = Accumulator(of_heads, self._add, self.is_first_layer)
            self._backend.grad_weight(x, gradient, whole)
            return
        product = self._backend.grad_weight(x, gradient)
        if name == "decoder":
            rows = total.view(H, 2, N // 2, D)[heads, :, pairs]
            total = rows.view(2 * len(rows), -1)  # p * D numbers next to one another
        else:
            columns = total.view(H, D, 2, N // 2)[heads, ..., pairs]
            total = columns.view(-1, columns.shape[-1])
        if self.is_first_layer:
            total.copy_(product.view(total.shape))
        else:
            self._add(total, product.view(total.shape))

    def cast_like(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums in the dtypes of the weights."""
        return [total.to(w.dtype) for total, w in zip(self._sums, weights, strict=True)]


@dataclass(frozen=True)
class _AttentionGradients:
    """What round 2 needs of a group of heads; all (g * X, C, ...)."""

    dscores_symmetric: Tensor
    """dS + dS^T, (C, C): each r is a query in the rows of S, and a key in its columns."""
    dc_from_states: Tensor
    """The gradient of c, but 0 where a token does not see the state before its chunk."""
    x_into_state: Tensor
    """x, but 0 where a token does not enter the state after its chunk."""
    dx_from_states: Accumulator | None
    """Collects the gradient that x gets through the states; None without states."""


class LayerBackward:
    """The backward pass of one layer: made for it, run once."""

    def __init__(
        self, ws: Workspace, x: Tensor, dy: Tensor, layer: int, gradients: WeightGradients
    ) -> None:
        """x and dy, the gradient of the layer's output before its norm: (X, C, D)."""
        self.ws, self.geo, self.backend = ws, ws.geo, ws.backend
        self.layer, self.gradients = layer, gradients
        self.x = x.to(ws.dtype)
        self.x_rows = self._activation(self.geo.as_rows(self.x), "x", shared=True)
        dy = dy.mul(ws.dropout_scale).to(ws.dtype)
        self.dy_rows = self._gradient(self.geo.as_rows(dy), "dy")

    def run(self, saved: list[SavedHeads]) -> Tensor:
        """Returns the gradient of x by way of the layer, (X, C, D); empties `saved`."""
        geo = self.geo
        dx = self.ws.accumulator(geo.g, geo.M, geo.D)
        for heads in geo.head_groups():
            scores, a, inverse_std = saved.pop(0)
            a_rows = self._activation(a, "a", shared=True)
            # `da` is a sum over all neurons, and the norm's backward needs it whole: hence two
            # rounds over the tiles, of the gate and of the attention.
            da = self._gate_round(heads, a_rows)
            dc = norm_backward_from_output(da.total, a, inverse_std).to(self.ws.dtype)  # B5
            dc = geo.by_chunk(dc)
            dx.add(scores.mT, dc)  # B6, of the x that scores weigh
            attention = self._attention_gradients(dc)
            self._attention_round(heads, a_rows, attention, dx)
            if attention.dx_from_states is not None:
                from_states = geo.by_head(attention.dx_from_states.total)
                from_states = masked(from_states, self.ws.masks.enters_state)
                dx.total.add_(from_states.view(dx.total.shape))
        return dx.total.sum(0).view(self.x.shape)

    def _gate_round(self, heads: slice, a_rows: Any) -> Accumulator:
        """Round 1: returns the gradient of a, (g, M, D); leaves du in its buffers if they are
        cached. Adds to the gradients of decoder and encoder_v."""
        geo, backend = self.geo, self.backend
        da = self.ws.accumulator(geo.g, geo.M, geo.D)
        for tile, pairs in enumerate(geo.tiles):
            z, dv = self._gate_backward(heads, tile, a_rows)
            z_rows, dv_rows = self._activation(z, "z"), self._gradient(dv, "dv")
            self.gradients.add("decoder", heads, pairs, z_rows, self.dy_rows)  # B2
            self.gradients.add("encoder_v", heads, pairs, a_rows, dv_rows)  # B3
            backend.grad_input(dv_rows, self.ws.weights[tile].encoder_v[heads], da)  # B4
        return da

    def _gate_backward(self, heads: slice, tile: int, a_rows: Any) -> tuple[Tensor, Tensor]:
        """Recomputes u and v of a tile. Returns z and dv, in the buffers of v and dz; leaves u in
        its buffer, and in that of du the part that comes by way of the gate."""
        ws, weights = self.ws, self.ws.weights[tile]
        u = encode(ws, self.x_rows, heads, tile)
        v = self.backend.forward(a_rows, weights.encoder_v[heads], ws.v[tile])
        dz = self.backend.grad_input(self.dy_rows, weights.decoder[heads], ws.dz[tile])  # B1
        du = ws.du[tile]
        mask = ws.dropout_mask(self.layer, heads, tile)
        u4, v4, dz4, du4 = (self.geo.by_head(each) for each in (u, v, dz, du))
        ws.ops.gate_backward(u4, v4, dz4, mask, du4)
        z, dv = v, dz  # the operation wrote z over v, and dv over dz
        return z, dv

    def _attention_gradients(self, dc: Tensor) -> _AttentionGradients:
        """dc (g * X, C, D): the gradient of c, which is a before its norm."""
        geo, masks = self.geo, self.ws.masks
        x = geo.repeat_heads(self.x)
        dscores = torch.bmm(dc, x.mT).view(geo.g, geo.X, geo.C, geo.C)
        dscores = geo.by_chunk(dscores.masked_fill_(masks.hidden, 0))
        symmetric = dscores + dscores.mT  # B7
        if not self.ws.has_states:
            return _AttentionGradients(symmetric, dc, x, None)
        return _AttentionGradients(
            symmetric,
            geo.by_chunk(masked(geo.by_head(dc), masks.sees_state)),
            geo.by_chunk(masked(geo.by_head(x), masks.enters_state)),
            self.ws.accumulator(geo.g * geo.X, geo.C, geo.D),
        )

    def _attention_round(
        self, heads: slice, a_rows: Any, attention: _AttentionGradients, dx: Accumulator
    ) -> None:
        """Round 2: completes du by what comes through the scores; adds to dx and the gradient of
        the encoder."""
        for tile, pairs in enumerate(self.geo.tiles):
            if not self.ws.args.tiling.cache_tiles:
                self._gate_backward(heads, tile, a_rows)  # the buffers hold another tile by now
            u, du = self.ws.u[tile], self.ws.du[tile]
            self._add_attention_gradient(u, du, tile, attention)
            du_rows = self._gradient(du, "du")
            self.gradients.add("encoder", heads, pairs, self.x_rows, du_rows)  # B9
            self.backend.grad_input(du_rows, self.ws.weights[tile].encoder[heads], dx)  # B10

    def _add_attention_gradient(
        self, u: Tensor, du: Tensor, tile: int, attention: _AttentionGradients
    ) -> None:
        """Adds to du what comes by way of r, and to dx_from_states what x gets from this tile."""
        ws, geo = self.ws, self.geo
        r = rotate(ws, u, tile)
        dr = geo.by_chunk(ws.dr[tile])
        torch.bmm(attention.dscores_symmetric, r, out=dr)  # B8
        if attention.dx_from_states is not None:
            # As a query, r read the state before its chunk; as a key, it was added to the state
            # after it, whose gradient comes from all later chunks.
            dc, x = attention.dc_from_states, attention.x_into_state
            states = scan_chunk_states(ws, torch.bmm(r.mT, x), tile)
            dstates = scan_chunk_states(ws, torch.bmm(r.mT, dc), tile, reverse=True)
            dr.baddbmm_(dc, states.mT).baddbmm_(x, dstates.mT)
            attention.dx_from_states.add(r, dstates)
        u4, dr4, du4 = (geo.by_head(each) for each in (u, dr, du))
        ws.ops.apply_rope_backward(u4, dr4, *ws.cos_sin(tile), du4)

    def _activation(self, x: Tensor, name: str, shared: bool = False) -> Any:
        return self.backend.activation(x, OperandId(name, self.layer), shared)

    def _gradient(self, gradient: Tensor, name: str) -> Any:
        return self.backend.gradient(gradient, OperandId(name, self.layer))


def norm_backward_from_output(gradient: Tensor, normed: Tensor, inverse_std: Tensor) -> Tensor:
    """Returns the gradient of a layer norm's input from its output, so that the input need not be
    saved: with y = (x - mean) * s, dx = s (dy - mean(dy) - y mean(dy y))."""
    normed = normed.to(gradient.dtype)
    along = (gradient * normed).mean(-1, keepdim=True)
    centered = gradient - gradient.mean(-1, keepdim=True)
    return centered.addcmul_(normed, along, value=-1).mul_(inverse_std)
