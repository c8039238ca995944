"""Layers of BDH by Triton kernels and cuBLAS products, for GPUs.

The mathematics and the letters are those of `model.bdh.fused_layers`, which cuts the neurons into
tiles that fit into a CPU's caches. A GPU's cache is too small for tiles that would fill the GPU, so
here a wide tensor, (M, H * N), is whole: nothing is summed over tiles, and no pass is made over a
wide tensor but by the products that make and use it. Where five of them take too much memory,
`fused_layers` takes the sequences in groups.

Generation, counts of active neurons, other number formats and other devices are computed by
`fused_layers.TiledLayers`. Dropout masks are the same there, so a run may change between the two.

B batch, T tokens, D = n_embd, H heads, N neurons per head; K chunks of C tokens in a sequence,
X chunks and M = X * C tokens in all
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.bdh.backward import norm_backward_from_output
from model.bdh.forward import masked
from model.bdh.masks import ChunkMasks, DropoutMask
from model.bdh.tiling import Geometry
from model.bdh.triton.launch import Capability, Kernels
from model.bdh.workspace import LayerStackArgs
from model.matmul import Accumulator


class PackedWeights(NamedTuple):
    """The weights in the dtype of products, all neurons side by side as in wide tensors."""

    encoder: Tensor  # (D, H * N)
    encoder_v: Tensor  # (H, D, N)
    decoder: Tensor  # (H * N, D)


class _WeightGradients:
    """The gradients of the weights in float32, summed over layers within the products."""

    def __init__(self, geo: Geometry, device: torch.device) -> None:
        D, H, N = geo.D, geo.H, geo.N
        shapes = (1, D, H * N), (H, D, N), (1, H * N, D)
        empty = (torch.empty(shape, device=device) for shape in shapes)
        self.encoder, self.encoder_v, self.decoder = (Accumulator(e, Tensor.add_) for e in empty)

    def cast_like(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums in the layouts and dtypes of the weights."""
        H, D, N = weights[0].shape
        encoder = self.encoder.total.view(D, H, N).transpose(0, 1).contiguous()
        sums = encoder, self.encoder_v.total, self.decoder.total[0]
        return [total.to(w.dtype) for total, w in zip(sums, weights, strict=True)]


class SavedLayer(NamedTuple):
    """What backward needs of a layer, besides its input and output."""

    scores: Tensor  # (M, H, C)
    a: Tensor  # (M, H, D), after its norm
    inverse_std: Tensor  # (M, H), of that norm
    s: Tensor | None  # (M, H * N); None: computed again
    r: Tensor | None


def _capability(device: torch.device) -> Capability:
    """Returns a GPU's compute capability; that of an H100 for Triton's interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


class TritonLayers:
    """Kernels, weights, masks and buffers of one pass over the layers, forward or backward.

    Its methods are those of `fused_layers.TiledLayers`.
    """

    sum_dtype = torch.float32

    def __init__(
        self,
        args: LayerStackArgs,
        weights: PackedWeights,
        x_shape: torch.Size,
        seed: Tensor | None,
    ) -> None:
        H, _, N = weights.encoder_v.shape
        self.weights, self.rotation = weights, args.rotation
        self.dtype, device = args.rotation.cos.dtype, args.rotation.cos.device
        self.geo = geo = Geometry.of(x_shape, H, N, args.tiling)
        self.kernels = Kernels(geo, self.dtype, _capability(device))
        self.masks = masks = ChunkMasks(args.documents, (geo.B, geo.K, geo.C), device)
        self.documents = None if masks.documents is None else masks.documents.view(-1)  # (M,)
        self.carries: Tensor | None = None  # (B, K)
        if masks.carries_state is not None:
            self.carries = masks.carries_state.view(geo.K, geo.B).mT.contiguous()
        # A recomputed layer is kept from the start of its own backward pass to the end of it.
        self.kept_layers = args.n_layer if args.recompute else args.tiling.kept_layers
        self._buffers: dict[str, Tensor] = {}
        self._dropout = args.hash_dropout(seed, geo, device)
        self.dropout_scale = self._dropout.scale if self._dropout else 1.0

    @staticmethod
    def pack(weights: Sequence[Tensor], args: LayerStackArgs) -> PackedWeights:
        """Returns copies of the weights for `__init__`."""
        encoder, encoder_v, decoder = (w.detach().to(args.rotation.cos.dtype) for w in weights)
        flat = encoder.transpose(0, 1).flatten(1)
        return PackedWeights(flat.contiguous(), encoder_v.contiguous(), decoder.contiguous())

    def forward(self, stream: Tensor, layer: int, keep: bool) -> tuple[Tensor, SavedLayer]:
        """Returns the layer's output before its norm and residual, (X, C, D), and what backward
        needs; stream (X, C, D). keep: whether s and r may have memory of their own for it."""
        geo, kernels, weights = self.geo, self.kernels, self.weights
        x = stream.to(self.dtype).view(geo.M, geo.D)
        wide, keep = (geo.M, geo.H * geo.N), keep and layer < self.kept_layers
        saved = SavedLayer(
            scores=x.new_empty(geo.M, geo.H, geo.C),
            a=x.new_empty(geo.M, geo.H, geo.D),
            inverse_std=stream.new_empty(geo.M, geo.H),
            s=x.new_empty(wide) if keep else None,
            r=x.new_empty(wide) if keep else None,
        )
        s, r = self._s_and_r(saved)
        kernels.encode(x, weights.encoder, self.rotation, s, r)
        past = self._read_states(x, r) if geo.K > 1 else None
        kernels.scores(r, self.documents, saved.scores)
        kernels.attend(saved.scores, x, past, saved.a, saved.inverse_std)
        z = self._buffer("z")
        kernels.gate(saved.a, weights.encoder_v, s, z, self._mask(layer))
        y = _sum_into(torch.empty_like(stream))
        y.add(z[None], weights.decoder[None])
        # Dropout's scale is applied here, to D numbers per token instead of to H * N.
        return y.total.mul_(self.dropout_scale), saved

    def weight_gradients(self, weights: Sequence[Tensor]) -> _WeightGradients:
        """Returns empty sums, to which `backward` adds."""
        return _WeightGradients(self.geo, weights[0].device)

    def backward(
        self,
        stream: Tensor,
        dy: Tensor,
        layer: int,
        of_layer: Sequence[Any],
        gradients: _WeightGradients,
    ) -> Tensor:
        """Returns the gradient of the stream (X, C, D) by way of the layer; dy (X, C, D) is that of
        the layer's output."""
        saved, rows = SavedLayer(*of_layer), (self.geo.M, self.geo.D)
        x = stream.to(self.dtype).view(rows)
        dy = dy.mul(self.dropout_scale).to(self.dtype).view(rows)
        s, r = self._s_and_r(saved)
        if saved.s is None:
            self.kernels.encode(x, self.weights.encoder, self.rotation, s, r)
        dc = self._gate_backward(s, dy, layer, saved, gradients)
        dx = self._attention_backward(x, s, r, dc, saved)
        du = self._buffer("du")
        gradients.encoder.add(x.mT[None], du[None])
        dx.add(du[None], self.weights.encoder.mT[None])
        return dx.total.view(stream.shape)

    def _gate_backward(
        self, s: Tensor, dy: Tensor, layer: int, saved: SavedLayer, gradients: _WeightGradients
    ) -> Tensor:
        """Returns dc, the gradient of a before its norm, (M, H, D); adds to the gradients of
        decoder and encoder_v. Leaves in du's buffer its part by way of z."""
        weights, a = self.weights, saved.a
        z, dv, du = (self._buffer(name) for name in ("z", "dv", "du"))
        out, mask = (z, dv, du), self._mask(layer)
        self.kernels.gate_backward(a, weights.encoder_v, dy, weights.decoder, s, out, mask)
        gradients.decoder.add(z.mT[None], dy[None])
        by_head = dv.view(self.geo.M, self.geo.H, -1).transpose(0, 1)  # (H, M, N)
        gradients.encoder_v.add(a.transpose(0, 1).mT, by_head)
        da = _sum_into(a.new_empty(self.geo.H, self.geo.M, self.geo.D, dtype=torch.float32))
        da.add(by_head, weights.encoder_v.mT)
        inverse_std = saved.inverse_std.unsqueeze(-1)
        dc = norm_backward_from_output(da.total.transpose(0, 1), a, inverse_std)
        return torch.empty_like(a).copy_(dc)

    def _attention_backward(
        self, x: Tensor, s: Tensor, r: Tensor, dc: Tensor, saved: SavedLayer
    ) -> Accumulator:
        """Returns the gradient of x by way of the attention, (M, D); completes du."""
        geo = self.geo
        dx = _sum_into(x.new_empty(x.shape, dtype=torch.float32))
        # Rows are tokens and heads: a product for each chunk sums over the heads, too.
        dx.add(saved.scores.view(geo.X, -1, geo.C).mT, dc.view(geo.X, -1, geo.D))
        dr_states = self._states_backward(x, r, dc, dx.total) if geo.K > 1 else None
        symmetric = torch.empty_like(saved.scores)
        self.kernels.scores_backward(dc, x, self.documents, symmetric)
        du = self._buffer("du")
        self.kernels.rope_backward(symmetric, r, s, dr_states, self.rotation, du)
        return dx

    # States of chunks: x is shared by the heads, so products with it are one for all of them.

    def _states(self, x: Tensor, r: Tensor) -> Tensor:
        """Returns the state before each chunk, (X, H * N, D), rotated to the chunk's start."""
        geo = self.geo
        x = masked(x.view(geo.X, geo.C, -1), self.masks.enters_state)
        states = torch.bmm(r.view(geo.X, geo.C, -1).mT, x)
        self.kernels.scan_states(states, self.rotation, self.carries)
        return states

    def _read_states(self, x: Tensor, r: Tensor) -> Tensor:
        """Returns what the states before the chunks add to c, (H, X, C, D) in float32."""
        geo, sees_state = self.geo, self.masks.sees_state
        states = self._states(x, r).view(geo.X, geo.H, geo.N, geo.D)
        r = r.view(geo.X, geo.C, geo.H, geo.N)
        past = x.new_empty(geo.H, geo.X, geo.C, geo.D, dtype=torch.float32)
        for h in range(geo.H):
            _sum_into(past[h]).add(r[:, :, h], states[:, h])
        return past if sees_state is None else past.mul_(sees_state)

    def _states_backward(self, x: Tensor, r: Tensor, dc: Tensor, dx: Tensor) -> Tensor:
        """Returns the gradient of r by way of the states, (M, H * N), in z's buffer; adds to dx.

        As a query, r read the state before its chunk; as a key, it was added to the state after it,
        whose gradient comes from all later chunks."""
        geo, masks = self.geo, self.masks
        by_head = (geo.X, geo.C, geo.H, -1)
        states = self._states(x, r).view(geo.X, geo.H, geo.N, geo.D)
        dc = masked(dc.view(geo.X, geo.C, -1), masks.sees_state).view(by_head)
        dstates = torch.empty_like(states)
        for h in range(geo.H):
            torch.bmm(r.view(by_head)[:, :, h].mT, dc[:, :, h], out=dstates[:, h])
        self.kernels.scan_states(dstates, self.rotation, self.carries, reverse=True)

        x = masked(x.view(geo.X, geo.C, -1), masks.enters_state)
        dstates = dstates.flatten(1, 2)  # (X, H * N, D)
        dr = self._buffer("z")
        torch.bmm(x, dstates.mT, out=dr.view(geo.X, geo.C, -1))
        for h in range(geo.H):
            dr.view(by_head)[:, :, h].baddbmm_(dc[:, :, h], states[:, h].mT)
        from_states = _sum_into(torch.empty_like(dx).view(x.shape))
        from_states.add(r.view(geo.X, geo.C, -1), dstates)
        dx.add_(masked(from_states.total, masks.enters_state).view(dx.shape))
        return dr

    def _s_and_r(self, saved: SavedLayer) -> tuple[Tensor, Tensor]:
        """Returns the memory of s and r: of their own if they are kept, else shared by layers."""
        if saved.s is not None and saved.r is not None:
            return saved.s, saved.r
        return self._buffer("s"), self._buffer("r")

    def _buffer(self, name: str) -> Tensor:
        """Returns wide memory, (M, H * N), that all layers share."""
        if name not in self._buffers:
            shape = (self.geo.M, self.geo.H * self.geo.N)
            self._buffers[name] = self.weights.decoder.new_empty(shape)
        return self._buffers[name]

    def _mask(self, layer: int) -> DropoutMask | None:
        if self._dropout is None:
            return None
        return self._dropout.mask(layer, slice(None), slice(None))


def _sum_into(total: Tensor) -> Accumulator:
    return Accumulator(total, Tensor.add_)
