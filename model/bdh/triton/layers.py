"""All layers of BDH as one autograd function of Triton kernels and cuBLAS products, for GPUs.

The mathematics and the letters are those of `model.bdh.fused_layers`, which cuts the neurons into
tiles that fit into a CPU's caches. A GPU's cache is too small for tiles that would fill the GPU, so
here a wide tensor, (M, H * N), is whole: nothing is summed over tiles, and no pass is made over a
wide tensor but by the products that make and use it. Where five of them take too much memory,
sequences are taken in parts; sums over the parts touch weight gradients only.

Not all is done here: generation, evaluation of active neurons, other number formats and other
devices take the way of `fused_layers`. Its dropout mask is the same, so that a run may change ways.

B batch, T tokens, D = n_embd, H heads, N neurons per head; K chunks of C tokens in a sequence,
X chunks and M = X * C tokens in all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.bdh.backward import norm_backward_from_output
from model.bdh.forward import masked
from model.bdh.fused_layers import Weights, norm, norm_backward
from model.bdh.masks import ChunkMasks, DropoutMask, HashDropout
from model.bdh.tiling import Geometry
from model.bdh.triton import shapes
from model.bdh.triton.launch import Capability, Kernels
from model.bdh.workspace import LayerStackArgs
from model.matmul import Accumulator


# Compilers would trace the loop over layers into one huge graph with nothing to fuse.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types here
def triton_layers(x: Tensor, weights: Weights, args: LayerStackArgs) -> Tensor:
    """Applies all layers with their residuals: x (B, T, D) -> (B, T, D).

    Of args.tiling only the chunk counts. Draws one number from torch's generator if there is
    dropout, as `fused_layers` does, and nothing otherwise.
    """
    seed = torch.randint(2**62, (), device=x.device) if args.dropout else None
    trained = torch.is_grad_enabled() and any(w.requires_grad for w in (x, *weights))
    result: Tensor = _TritonLayers.apply(x, *weights, args, seed, trained)  # type: ignore[no-untyped-call]
    return result


class _TritonLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *weights, args, seed, trained = rest
        layers = _Layers(args, _pack(weights, args.rotation.cos.dtype), x.shape, seed)
        stream = layers.geo.split(x.float()).flatten(0, 1)  # (M, D)
        saved: list[Tensor | None] = []
        for layer in range(args.n_layer):
            y, of_layer = layers.forward(stream, layer, keep=trained)
            if trained:
                saved += [stream, y, *of_layer]
            stream = norm(stream + norm(y))
            del y, of_layer
        if saved:
            ctx.save_for_backward(*weights, *saved)
            ctx.args, ctx.seed, ctx.shape, ctx.dtype = args, seed, x.shape, x.dtype
            ctx.packed = layers.weights
        return layers.geo.join(stream).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        weights, saved = ctx.saved_tensors[:3], list(ctx.saved_tensors[3:])
        # Autograd frees only what it saved itself, so the packed weights are freed here; with
        # retain_graph a second backward pass packs them anew.
        packed, ctx.packed = ctx.packed or _pack(weights, ctx.args.rotation.cos.dtype), None
        layers = _Layers(ctx.args, packed, ctx.shape, ctx.seed)
        gradients = _WeightGradients(layers.geo, packed.decoder.device)
        dstream = layers.geo.split(dx.float()).flatten(0, 1)
        for layer in reversed(range(ctx.args.n_layer)):
            stream, y, *of_layer = saved[-_SAVED:]
            del saved[-_SAVED:]
            dsum = norm_backward(dstream, stream + norm(y))
            dy = norm_backward(dsum, y)
            dstream = layers.backward(stream, dy, layer, SavedLayer(*of_layer), gradients)
            dstream += dsum
            del stream, y, of_layer
        dx = layers.geo.join(dstream).to(ctx.dtype)
        return dx, *gradients.cast_like(weights), None, None, None


class _Packed(NamedTuple):
    """The weights in the dtype of products, all neurons side by side as in wide tensors."""

    encoder: Tensor  # (D, H * N)
    encoder_v: Tensor  # (H, D, N)
    decoder: Tensor  # (H * N, D)


def _pack(weights: Sequence[Tensor], dtype: torch.dtype) -> _Packed:
    encoder, encoder_v, decoder = (w.detach().to(dtype) for w in weights)
    flat = encoder.transpose(0, 1).flatten(1)
    return _Packed(flat.contiguous(), encoder_v.contiguous(), decoder.contiguous())


class _WeightGradients:
    """The gradients of the weights in float32, summed over layers and parts within the products."""

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

    def of_rows(self, rows: slice) -> SavedLayer:
        s, r = (None if wide is None else wide[rows] for wide in (self.s, self.r))
        return SavedLayer(self.scores[rows], self.a[rows], self.inverse_std[rows], s, r)


_SAVED = 2 + len(SavedLayer._fields)  # of a layer: its input, its output and these


@dataclass(frozen=True)
class _Part:
    """Some of the sequences: their places in all tensors, their sizes, masks and kernels."""

    geo: Geometry
    rows: slice  # of M
    chunks: slice  # of X
    documents: Tensor | None  # (M,)
    sees_state: Tensor | None  # (X, C, 1); these three as in `ChunkMasks`
    enters_state: Tensor | None  # (X, C, 1)
    carries_state: Tensor | None  # (B, K)
    kernels: Kernels


def _cut_sequences(geo: Geometry, args: LayerStackArgs) -> list[_Part]:
    """Cuts the sequences into as few parts as memory allows, of nearly equal size."""
    cos = args.rotation.cos
    size = shapes.sequences_at_once(geo.B, geo.K * geo.C * geo.H * geo.N * cos.dtype.itemsize)
    starts = range(0, geo.B, size)
    return [_part(geo, args, start, min(start + size, geo.B)) for start in starts]


def _part(geo: Geometry, args: LayerStackArgs, start: int, end: int) -> _Part:
    """Returns the part of the sequences from start to end."""
    device, dtype = args.rotation.cos.device, args.rotation.cos.dtype
    sizes = torch.Size((end - start, geo.T, geo.D))
    part = Geometry.of(sizes, geo.H, geo.N, args.tiling)
    documents = None if args.documents is None else args.documents[start:end]
    masks = ChunkMasks(documents, (part.B, part.K, part.C), device)
    carries = masks.carries_state
    return _Part(
        geo=part,
        rows=slice(start * geo.K * geo.C, end * geo.K * geo.C),
        chunks=slice(start * geo.K, end * geo.K),
        documents=None if masks.documents is None else masks.documents.view(-1),
        sees_state=masks.sees_state,
        enters_state=masks.enters_state,
        carries_state=None if carries is None else carries.view(part.K, part.B).mT.contiguous(),
        kernels=Kernels(part, dtype, _capability(device)),
    )


def _capability(device: torch.device) -> Capability:
    """Returns a GPU's compute capability; that of an H100 for Triton's interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


class _Layers:
    """Kernels, weights and buffers of one pass over the layers, forward or backward."""

    def __init__(
        self, args: LayerStackArgs, weights: _Packed, x_shape: torch.Size, seed: Tensor | None
    ) -> None:
        H, _, N = weights.encoder_v.shape
        self.weights, self.rotation = weights, args.rotation
        self.dtype = args.rotation.cos.dtype
        self.geo = geo = Geometry.of(x_shape, H, N, args.tiling)
        self.parts = _cut_sequences(geo, args)
        self.kept_layers = shapes.kept_layers(geo.M * H * N * self.dtype.itemsize)
        self._buffers: dict[str, Tensor] = {}
        self._dropout: HashDropout | None = None
        if seed is not None:
            device = weights.encoder.device
            self._dropout = HashDropout(args.dropout, seed, args.n_layer, geo, device)
        self.dropout_scale = self._dropout.scale if self._dropout else 1.0

    def forward(self, stream: Tensor, layer: int, keep: bool) -> tuple[Tensor, SavedLayer]:
        """Returns the layer's output before its norm and residual, (M, D) in float32, and what
        backward needs; stream (M, D). keep: whether s and r may be kept for backward."""
        geo, x = self.geo, stream.to(self.dtype)
        wide = (geo.M, geo.H * geo.N)
        keep = keep and layer < self.kept_layers
        saved = SavedLayer(
            scores=x.new_empty(geo.M, geo.H, geo.C),
            a=x.new_empty(geo.M, geo.H, geo.D),
            inverse_std=stream.new_empty(geo.M, geo.H),
            s=x.new_empty(wide) if keep else None,
            r=x.new_empty(wide) if keep else None,
        )
        y = torch.empty_like(stream)
        for part in self.parts:
            rows = part.rows
            self._forward_part(part, layer, x[rows], saved.of_rows(rows), y[rows])
        # Dropout's scale is applied here, to D numbers per token instead of to H * N.
        return y.mul_(self.dropout_scale), saved

    def _forward_part(
        self, part: _Part, layer: int, x: Tensor, saved: SavedLayer, y: Tensor
    ) -> None:
        kernels, weights = part.kernels, self.weights
        s, r = self._s_and_r(part, saved)
        kernels.encode(x, weights.encoder, self.rotation, s, r)
        past = self._read_states(part, x, r) if part.geo.K > 1 else None
        kernels.scores(r, part.documents, saved.scores)
        kernels.attend(saved.scores, x, past, saved.a, saved.inverse_std)
        z = self._buffer("z", part)
        kernels.gate(saved.a, weights.encoder_v, s, z, self._mask(part, layer))
        _sum_into(y).add(z[None], weights.decoder[None])

    def backward(
        self,
        stream: Tensor,
        dy: Tensor,
        layer: int,
        saved: SavedLayer,
        gradients: _WeightGradients,
    ) -> Tensor:
        """Returns the gradient of x by way of the layer, (M, D); stream and dy, the gradient of the
        layer's output before its norm: (M, D)."""
        x, dy = stream.to(self.dtype), dy.mul(self.dropout_scale).to(self.dtype)
        dx = torch.empty_like(stream)
        for part in self.parts:
            rows, of_part = part.rows, saved.of_rows(part.rows)
            dc = self._gate_backward(part, layer, x[rows], dy[rows], of_part, gradients)
            self._attention_backward(part, x[rows], dc, of_part, gradients, dx[rows])
        return dx

    def _gate_backward(
        self,
        part: _Part,
        layer: int,
        x: Tensor,
        dy: Tensor,
        saved: SavedLayer,
        gradients: _WeightGradients,
    ) -> Tensor:
        """Returns dc, the gradient of a before its norm, (M, H, D); adds to the gradients of
        decoder and encoder_v. Leaves s and r in their memory, and in du's its part by way of z."""
        kernels, weights = part.kernels, self.weights
        s, r = self._s_and_r(part, saved)
        if saved.s is None:
            kernels.encode(x, weights.encoder, self.rotation, s, r)
        z, dv, du = (self._buffer(name, part) for name in ("z", "dv", "du"))
        out, mask = (z, dv, du), self._mask(part, layer)
        kernels.gate_backward(saved.a, weights.encoder_v, dy, weights.decoder, s, out, mask)
        gradients.decoder.add(z.mT[None], dy[None])
        a, dv = saved.a.transpose(0, 1), dv.view(part.geo.M, part.geo.H, -1).transpose(0, 1)
        gradients.encoder_v.add(a.mT, dv)
        da = _sum_into(x.new_empty(a.shape, dtype=torch.float32))
        da.add(dv, weights.encoder_v.mT)
        dc = norm_backward_from_output(
            da.total.transpose(0, 1), saved.a, saved.inverse_std.unsqueeze(-1)
        )
        return torch.empty_like(saved.a).copy_(dc)

    def _attention_backward(
        self,
        part: _Part,
        x: Tensor,
        dc: Tensor,
        saved: SavedLayer,
        gradients: _WeightGradients,
        dx: Tensor,
    ) -> None:
        """Writes dx (M, D) and adds to the gradient of the encoder."""
        geo, kernels = part.geo, part.kernels
        (s, r), du = self._s_and_r(part, saved), self._buffer("du", part)
        dx_sum = _sum_into(dx)
        # Rows are tokens and heads: a product for each chunk sums over the heads, too.
        scores, of_chunks = saved.scores.view(geo.X, -1, geo.C), dc.view(geo.X, -1, geo.D)
        dx_sum.add(scores.mT, of_chunks)
        dr_states = self._states_backward(part, x, r, dc, dx) if geo.K > 1 else None
        dscores_symmetric = torch.empty_like(saved.scores)
        kernels.scores_backward(dc, x, part.documents, dscores_symmetric)
        kernels.rope_backward(dscores_symmetric, r, s, dr_states, self.rotation, du)
        gradients.encoder.add(x.mT[None], du[None])
        dx_sum.add(du[None], self.weights.encoder.mT[None])

    # States of chunks: x is shared by the heads, so products with it are one for all of them.

    def _states(self, part: _Part, x: Tensor, r: Tensor) -> Tensor:
        """Returns the state before each chunk, (X, H * N, D), rotated to the chunk's start."""
        geo = part.geo
        x = masked(x.view(geo.X, geo.C, -1), part.enters_state)
        states = torch.bmm(r.view(geo.X, geo.C, -1).mT, x)
        part.kernels.scan_states(states, self.rotation, part.carries_state)
        return states

    def _read_states(self, part: _Part, x: Tensor, r: Tensor) -> Tensor:
        """Returns what the states before the chunks add to c, (H, M, D) in float32."""
        geo = part.geo
        states = self._states(part, x, r).view(geo.X, geo.H, geo.N, geo.D)
        r = r.view(geo.X, geo.C, geo.H, geo.N)
        past = x.new_empty(geo.H, geo.X, geo.C, geo.D, dtype=torch.float32)
        for h in range(geo.H):
            _sum_into(past[h]).add(r[:, :, h], states[:, h])
        return past if part.sees_state is None else past.mul_(part.sees_state)

    def _states_backward(self, part: _Part, x: Tensor, r: Tensor, dc: Tensor, dx: Tensor) -> Tensor:
        """Returns the gradient of r by way of the states, (M, H * N), in z's buffer; adds to dx.

        As a query, r read the state before its chunk; as a key, it was added to the state after it,
        whose gradient comes from all later chunks."""
        geo = part.geo
        by_head = (geo.X, geo.C, geo.H, -1)
        states = self._states(part, x, r).view(geo.X, geo.H, geo.N, geo.D)
        dc = masked(dc.view(geo.X, geo.C, -1), part.sees_state).view(by_head)
        dstates = torch.empty_like(states)
        for h in range(geo.H):
            torch.bmm(r.view(by_head)[:, :, h].mT, dc[:, :, h], out=dstates[:, h])
        part.kernels.scan_states(dstates, self.rotation, part.carries_state, reverse=True)

        x = masked(x.view(geo.X, geo.C, -1), part.enters_state)
        dstates = dstates.flatten(1, 2)  # (X, H * N, D)
        dr = self._buffer("z", part)
        torch.bmm(x, dstates.mT, out=dr.view(geo.X, geo.C, -1))
        for h in range(geo.H):
            dr.view(by_head)[:, :, h].baddbmm_(dc[:, :, h], states[:, h].mT)
        from_states = _sum_into(torch.empty_like(dx).view(x.shape))
        from_states.add(r.view(geo.X, geo.C, -1), dstates)
        dx.add_(masked(from_states.total, part.enters_state).view(dx.shape))
        return dr

    def _s_and_r(self, part: _Part, saved: SavedLayer) -> tuple[Tensor, Tensor]:
        """Returns the memory of s and r: of their own if they are kept, else shared by layers."""
        if saved.s is not None and saved.r is not None:
            return saved.s, saved.r
        return self._buffer("s", part), self._buffer("r", part)

    def _buffer(self, name: str, part: _Part) -> Tensor:
        """Returns wide memory, (M, H * N), that all layers and parts share."""
        geo, longest = self.geo, max(part.geo.M for part in self.parts)
        if name not in self._buffers:
            shape = (longest, geo.H * geo.N)
            self._buffers[name] = self.weights.decoder.new_empty(shape)
        return self._buffers[name][: part.geo.M]

    def _mask(self, part: _Part, layer: int) -> DropoutMask | None:
        if self._dropout is None:
            return None
        mask = self._dropout.mask(layer, slice(None), slice(None))
        return mask._replace(rows=mask.rows[part.chunks])


def _sum_into(total: Tensor) -> Accumulator:
    return Accumulator(total, Tensor.add_)
