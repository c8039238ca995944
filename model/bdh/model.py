"""BDH, the Dragon Hatchling: linear attention over sparse, positive neurons.

All layers share the weights of one. A token's D numbers are expanded to H * N neurons, of which a
few percent are active after training. Attention has no softmax, its queries are its keys, and two
tokens attend to each other by the neurons that are active in both.

    x = LN(embed(tokens))
    n_layer times, for each head h:
        s = relu(x E_h)                             # (B, T, N), few neurons are active
        r = rope(s)                                 # rotated by the position
        a = LN(sum over i < t of (r_t . r_i) x_i)   # strictly causal: t does not see itself
        z = dropout(s * relu(a G_h))
        x = LN(x + LN(sum over h of z W_h))
    logits = x lm_head

In the code E is `encoder`, G is `encoder_v` and W is `decoder`.

Source: Kosowski et al., "The Dragon Hatchling", arXiv 2509.26507, and the authors' reference code,
whose weights load and export unchanged (`model.bdh.upstream`).

B batch, T tokens, D = n_embd, H = n_head, N neurons per head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import BDHConfig
from model.attention import Embedding, matmul_dtype
from model.bdh.dense import DenseArgs, dense_layers
from model.bdh.elementwise import EAGER, compiled_ops
from model.bdh.fused_layers import fused_layers
from model.bdh.recurrent import BDHState, step
from model.bdh.tiling import Rotation, Tiling, rope_frequencies, rotation
from model.bdh.triton.shapes import triton_tiling, unsupported_shape
from model.bdh.workspace import LayerStackArgs
from model.interface import HiddenWeight, LanguageModel
from model.loss import head_loss
from model.matmul import MatmulBackend, OperandId, PlainMatmul

INIT_STD = 0.02


class BDH(LanguageModel):
    """The neurons of a head are stored in two halves: the first members of all rotated pairs, then
    the second members, so that rotation needs no strided access. The reference interleaves them.

    `frequencies` are part of the weights, since a model that was grown or merged from others keeps
    theirs. They stay in float64 on the CPU, wherever the model is moved and whatever it is cast to:
    angles are computed there, and some devices have no float64.
    """

    # DDP would broadcast the buffer, and the backends of devices cannot send what is on the CPU.
    _ddp_params_and_buffers_to_ignore = ("frequencies",)

    layers_share_weights = True
    matmul_backend: MatmulBackend

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        self.config, self.n_layer = config, config.n_layer
        D, H, V = config.n_embd, config.n_head, config.vocab_size
        N = config.mlp_internal_dim_multiplier * D // H
        self.embed = Embedding(V, D)
        self.encoder = nn.Parameter(torch.empty(H, D, N))  # E
        self.encoder_v = nn.Parameter(torch.empty(H, D, N))  # G
        self.decoder = nn.Parameter(torch.empty(H * N, D))  # W
        self.lm_head = nn.Parameter(torch.empty(D, V))
        self.frequencies: Tensor
        self.register_buffer("frequencies", rope_frequencies(N))  # turns per token, (N/2,)
        self.compiled_elementwise = False  # set by `compile`
        self.triton = False  # set by `use_triton`
        self.matmul_backend = PlainMatmul()
        self._rotations: dict[tuple[object, ...], Rotation] = {}
        self.init_weights()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, width and neurons per head: (H, D, N)."""
        H, D, N = self.encoder.shape
        return H, D, N

    def init_weight(self, name: str, weight: Tensor) -> None:
        """Draws from N(0, 0.02**2), as the reference does."""
        if name == "encoder":
            # The first weight. nn.Embedding drew its own before it, which these numbers stand for:
            # a seed gives the weights that it always gave.
            torch.empty(self.embed.weight.shape, device=weight.device).normal_()
        weight.normal_(std=INIT_STD)

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        x = F.layer_norm(self.embed(tokens), (self.config.n_embd,))  # (B, T, D)
        x = self._layers(x, documents)
        if targets is None:
            return x @ self.lm_head  # (B, T, V)
        return head_loss(x.flatten(0, 1), self.lm_head.mT, None, targets.flatten())

    def _layers(
        self,
        x: Tensor,
        documents: Tensor | None = None,
        states: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Applies all layers: x (B, T, D) -> (B, T, D); the rest as in `LayerStackArgs`."""
        if not x.numel():
            return x
        # States and counts are for generation and evaluation: no dropout, and eager operations,
        # since the lengths of prompts differ and each would compile anew.
        for_training = states is None and active is None
        dtype = matmul_dtype(x)
        weights = (self.encoder, self.encoder_v, self.decoder)
        dropout = self.config.dropout if self.training and for_training else 0.0
        if self.projections is not None and for_training:
            cos_sin = self._rotation(x.shape[1], dtype)
            compiled = self.compiled_elementwise
            args = DenseArgs(self.n_layer, dropout, cos_sin, documents, compiled)
            return dense_layers(x, self.projections(weights), args)
        # Triton kernels neither continue states nor count, and have float32 sums.
        triton = self.triton and for_training and dtype != torch.float64
        tiling = triton_tiling(x.shape[:2], self.shape, dtype) if triton else self._tiling(x, dtype)
        stack = LayerStackArgs(
            n_layer=self.n_layer,
            dropout=dropout,
            rotation=self._rotation(tiling.chunk, dtype),
            tiling=tiling,
            backend=self.matmul_backend,
            ops=compiled_ops() if self.compiled_elementwise and for_training else EAGER,
            documents=documents,
            states=states,
            active=active,
            recompute=self.recompute,
            triton=triton,
        )
        result: Tensor = fused_layers(x, weights, stack)
        return result

    def use_triton(self) -> str | None:
        reason = unsupported_shape(self.shape)
        self.triton = reason is None
        return reason

    def hidden_weights(self) -> list[HiddenWeight]:
        weights = (self.encoder, self.encoder_v, self.decoder)
        return [HiddenWeight(weight, self.config.n_head) for weight in weights]

    def matmul_operands(self) -> dict[OperandId, bool]:
        found = {OperandId(name, 0): False for name in ("encoder", "encoder_v", "decoder")}
        for layer in range(self.n_layer):
            found |= {OperandId(name, layer): False for name in ("x", "a", "z")}
            found |= {OperandId(name, layer): True for name in ("dy", "dv", "du")}
        return found

    def embedding_and_head(self) -> tuple[Tensor, Tensor]:
        return self.embed.weight, self.lm_head

    def cache_bytes(self, length: int) -> int:
        """Returns the memory of one sample's state, which does not depend on the length."""
        H, D, N = self.shape
        return self.config.n_layer * H * N * D * max(4, self.encoder.element_size())

    def init_cache(self, batch_size: int, max_length: int | None = None) -> BDHState:
        """Returns the state before the first token: zeros, of one size for any length."""
        H, D, N = self.shape
        shape = (self.config.n_layer, H, batch_size, 2, N // 2, D)
        exact = torch.promote_types(self.encoder.dtype, torch.float32)
        device = self.encoder.device
        return BDHState(
            sums=self.encoder.new_zeros(shape, dtype=exact),
            rows_v=self.encoder_v.detach().mT.reshape(-1, D) if self.encoder.is_cpu else None,
            # Copied once: from a CPU, the angles of each token would be. Only mps has no float64.
            frequencies=self.frequencies.to("cpu" if device.type == "mps" else device),
        )

    def clear_cache(self, cache: BDHState) -> None:
        cache.clear()

    @torch.no_grad()
    def prefill_or_decode(self, tokens: Tensor, cache: BDHState) -> Tensor:
        # Many tokens are processed in parallel, one by the recurrent form at a constant cost.
        if tokens.shape[1] == 1:
            logits = self.decode_at(tokens, cache, cache.position)
        else:
            x = F.layer_norm(self.embed(tokens), (self.config.n_embd,))
            cache.rotate_to_position()
            logits = self._layers(x, states=cache.sums)[:, -1] @ self.lm_head
            # The last chunk is padded, and the states are left rotated to its end.
            tiling = self._tiling(x, matmul_dtype(x))
            cache.rotated_to += tiling.padded(tokens.shape[1])
        cache.position += tokens.shape[1]
        return logits

    @torch.no_grad()
    def decode_at(self, tokens: Tensor, cache: BDHState, position: int | Tensor) -> Tensor:
        x = F.layer_norm(self.embed(tokens), (self.config.n_embd,))
        weights = (self.encoder, self.encoder_v, self.decoder)
        return step(x[:, 0], weights, cache, position) @ self.lm_head

    def _tiling(self, x: Tensor, dtype: torch.dtype) -> Tiling:
        B, T, _ = x.shape
        return Tiling.of((B, T), self.shape, dtype, x.is_cpu)

    def _rotation(self, chunk: int, dtype: torch.dtype) -> Rotation:
        """Returns the rotation of a chunk; caches the last few."""
        key = (chunk, dtype, self.encoder.device)
        if key not in self._rotations:
            if len(self._rotations) >= 4:
                self._rotations.clear()
            with torch.inference_mode(False):  # training may use what an evaluation made
                self._rotations[key] = rotation(self.frequencies, *key)
        return self._rotations[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BDH:
        """Moves or casts everything but the frequencies; `to`, `half` and `cuda` call it."""
        frequencies = self._buffers.pop("frequencies")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch
        self._buffers["frequencies"] = frequencies
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Accepts weights of older checkpoints without frequencies: they had the usual ones."""
        self._rotations.clear()
        if f"{prefix}frequencies" not in state:
            state = state | {f"{prefix}frequencies": rope_frequencies(self.shape[2])}
        super()._load_from_state_dict(state, prefix, *rest)

    @torch.no_grad()
    def active_fraction(
        self, tokens: Tensor, documents: Tensor | None = None
    ) -> dict[str, list[float]]:
        """Returns the fractions of neurons with s > 0 and with z > 0, by layer."""
        active = torch.zeros(self.config.n_layer, 2, dtype=torch.long, device=tokens.device)
        x = F.layer_norm(self.embed(tokens), (self.config.n_embd,))
        self._layers(x, documents, active=active)
        shares = active.cpu().double() / (tokens.numel() * len(self.decoder))
        return {"s": shares[:, 0].tolist(), "z": shares[:, 1].tolist()}

    def compile(self, *, disable: bool = False) -> None:
        """Compiles the elementwise work between products, instead of the whole model as torch does:
        loops over tiles and layers would unroll into one graph, and there is no more to gain.
        """
        self.compiled_elementwise = self.matmul_backend.compiled = not disable

    def flops_per_token(self, block_size: int) -> int:
        """Forward and backward (three times forward), each token seeing those before it once.

        A block of one chunk is counted as the causal half of its scores, a longer one as the half
        within chunks and the states between them.
        """
        H, D, N = self.shape
        tiling = Tiling.of((1, block_size), self.shape, self.encoder.dtype, on_cpu=True)
        projections = 3 * 2 * D * H * N
        attention = tiling.chunk * H * (N + D)  # C / 2 pairs, 2 FLOPs over N and over D
        if tiling.chunk < block_size:
            attention += 4 * H * N * D  # into the state and out of it
        head = 2 * D * self.config.vocab_size
        return 3 * (self.config.n_layer * (projections + attention) + head)
