"""One BDH layer forward, tile by tile; the steps F1 to F7 are those of `fused_layers`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.bdh.workspace import Workspace
from model.matmul import Accumulator, OperandId

LAYER_NORM_EPS = 1e-5


class SavedHeads(NamedTuple):
    """What backward needs of a group of heads in one layer."""

    scores: Tensor  # (g * X, C, C), in the dtype of the products
    a: Tensor  # (g, M, D), after its norm
    inverse_std: Tensor  # (g, M, 1), of that norm


def layer_forward(ws: Workspace, x: Tensor, layer: int) -> tuple[Tensor, list[SavedHeads]]:
    """Returns the layer's output y before its norm and residual, (X, C, D), and what backward needs
    of each group of heads; x (X, C, D)."""
    geo, backend = ws.geo, ws.backend
    x = x.to(ws.dtype)
    x_rows = backend.activation(geo.as_rows(x), OperandId("x", layer), shared=True)
    y = ws.accumulator(geo.g, geo.M, geo.D)
    saved: list[SavedHeads] = []
    for heads in geo.head_groups():
        # Round 1 over the tiles sums up the scores. The norm of `a` needs all neurons, so the gate
        # has to wait for round 2, which computes u once more unless tiles are cached.
        scores, c_from_states = _attend(ws, x, x_rows, heads, layer)
        a = torch.bmm(scores, geo.repeat_heads(x)).to(ws.sum_dtype)
        a = a if c_from_states is None else a.add_(c_from_states)  # F3
        a, _, inverse_std = torch.native_layer_norm(a, (geo.D,), None, None, LAYER_NORM_EPS)
        a = a.to(ws.dtype).view(geo.g, geo.M, geo.D)  # F4
        a_rows = backend.activation(a, OperandId("a", layer), shared=True)
        for tile, weights in enumerate(ws.weights):
            u = u_of_tile(ws, x_rows, heads, tile)
            v = backend.forward(a_rows, weights.encoder_v[heads], ws.v[tile])  # F5
            mask = ws.dropout_mask(layer, heads, tile)
            ws.ops.gate(geo.by_head(u), geo.by_head(v), mask)  # F6
            z = v  # the gate wrote z over v
            if ws.args.active is not None:
                ws.args.active[layer] += torch.stack([(u > 0).sum(), (z > 0).sum()])
            z_rows = backend.activation(z, OperandId("z", layer))
            backend.forward(z_rows, weights.decoder[heads], y)  # F7, summed over tiles and groups
        saved.append(SavedHeads(scores, a, inverse_std.view(geo.g, geo.M, 1)))
    # Dropout's scale is applied here, to D numbers per token instead of to N.
    return y.total.sum(0).mul_(ws.dropout_scale).view(x.shape), saved


def _attend(
    ws: Workspace, x: Tensor, x_rows: Any, heads: slice, layer: int
) -> tuple[Tensor, Tensor | None]:
    """Returns the scores within chunks, (g * X, C, C), and what the states from before them add to
    c, (g * X, C, D); x_rows: x as an operand."""
    geo, masks = ws.geo, ws.masks
    scores = torch.empty(geo.g * geo.X, geo.C, geo.C, dtype=ws.sum_dtype, device=ws.device)
    strips = [Accumulator(scores[:, rows, : rows.stop], ws.ops.add) for rows in geo.strips]
    c_from_states = ws.accumulator(geo.g * geo.X, geo.C, geo.D) if ws.has_states else None
    x_into_state = geo.repeat_heads(masked(x, masks.enters_state))
    for tile in range(len(geo.tiles)):
        u = encode(ws, x_rows, heads, tile)
        r = rotate(ws, u, tile)  # F1
        for rows, strip in zip(geo.strips, strips, strict=True):
            strip.add(r[:, rows], r[:, : rows.stop].mT)  # F2
        if c_from_states is not None:
            initial = ws.initial_states(layer, heads, tile)
            states = scan_chunk_states(ws, torch.bmm(r.mT, x_into_state), tile, initial)
            c_from_states.add(r, states)
    scores.view(geo.g, geo.X, geo.C, geo.C).masked_fill_(masks.hidden, 0)
    if c_from_states is not None and masks.sees_state is not None:
        geo.by_head(c_from_states.total).mul_(masks.sees_state)
    return scores.to(ws.dtype), None if c_from_states is None else c_from_states.total


def encode(ws: Workspace, x_rows: Any, heads: slice, tile: int) -> Tensor:
    """Computes u = x E of a tile into its buffer, (g, M, n)."""
    return ws.backend.forward(x_rows, ws.weights[tile].encoder[heads], ws.u[tile])


def u_of_tile(ws: Workspace, x_rows: Any, heads: slice, tile: int) -> Tensor:
    """Returns u of a tile: cached by the round before, or computed again."""
    if ws.args.tiling.cache_tiles:
        return ws.u[tile]
    return encode(ws, x_rows, heads, tile)


def rotate(ws: Workspace, u: Tensor, tile: int) -> Tensor:
    """Computes r = rope(relu(u)) of a tile into its buffer, (g * X, C, n)."""
    r = ws.r[tile]
    ws.ops.apply_rope(ws.geo.by_head(u), *ws.cos_sin(tile), ws.geo.by_head(r))
    return ws.geo.by_chunk(r)


def scan_chunk_states(
    ws: Workspace,
    chunk_sums: Tensor,
    tile: int,
    initial: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """Replaces each chunk's own sum of r_i x_i^T, (g * X, n, D), by the state before the chunk.

    The state after a chunk is the state before it plus the chunk's sum, rotated back by C tokens:
    rope depends on distances only, so each chunk counts positions from its own start. The loop over
    chunks is sequential, but elementwise; the products with r are done for all chunks at once.

    initial (g, B, 2, p, D): the state before the first chunk instead of zeros; replaced by the
    state after the last one. reverse: from the last chunk to the first, which gives the gradient of
    the state after each chunk from what each chunk adds to the gradient of the state before it.
    """
    geo, pairs = ws.geo, ws.geo.tiles[tile]
    sums = chunk_sums.view(geo.g, geo.B, geo.K, -1, geo.D)
    cos = ws.args.rotation.chunk_cos[pairs, None]
    sin = ws.args.rotation.chunk_sin[pairs, None] * (-1 if reverse else 1)
    if initial is None:
        state = torch.zeros_like(sums[:, :, 0], dtype=ws.sum_dtype)
    else:
        state = initial.flatten(2, 3)
    carries = ws.masks.carries_state
    if 1 < geo.K <= ws.args.tiling.scan:
        sums, state = _scan_at_once(ws, sums, state, cos, sin, reverse)
    else:
        for k in reversed(range(geo.K)) if reverse else range(geo.K):
            carried = None if carries is None else carries[k]
            state = ws.ops.advance_state(sums[:, :, k], state, carried, cos, sin)
    if initial is not None:
        initial.copy_(state.view(initial.shape))
    return sums.view(chunk_sums.shape)


def _scan_at_once(
    ws: Workspace, sums: Tensor, state: Tensor, cos: Tensor, sin: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Returns the states before each chunk, (g * B, K, 2, p * D), and the last one, (g * B, 2,
    p * D), from sums (g, B, K, n, D), state (g, B, n, D) and a chunk's cos and sin, (p, 1)."""
    geo, carries = ws.geo, ws.masks.carries_state
    rows = geo.g * geo.B
    if carries is not None:
        carries = carries.view(geo.K, 1, geo.B).expand(-1, geo.g, -1).reshape(geo.K, rows, 1)
    cos, sin = (part.expand(-1, geo.D).flatten() for part in (cos, sin))
    sums, state = sums.view(rows, geo.K, 2, -1), state.reshape(rows, 2, -1)
    return ws.ops.scan_states(sums, state, carries, cos, sin, reverse)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns x (..., X, C, D) where the mask (X, C, 1) is true, else 0; all of x without one."""
    return x if mask is None else x * mask
