"""BDH, the Dragon Hatchling: linear attention over sparse, positive neurons.

One layer's weights serve all layers. A token's state of D numbers is spread over H * N neurons, of
which only a few percent are active; two tokens attend to each other by the neurons they share,
without softmax, and queries are the keys.

    x = LN(embed(tokens))
    n_layer times, for each head h:
        s = relu(x E_h)                             # neurons that are active
        r = rope(s)                                 # turned by the position
        a = LN(sum over u < t of (r_t . r_u) x_u)   # strictly causal: t does not see itself
        z = dropout(s * relu(a G_h))
        x = LN(x + LN(sum over h of z F_h))
    logits = x lm_head

Source: Kosowski et al., "The Dragon Hatchling", arXiv 2509.26507, and the authors' reference code,
whose weights load and export unchanged (`from_upstream`, `to_upstream`).

B batch, T tokens, D = n_embd, H = n_head, N neurons per head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import BDHConfig
from model.attention import product_dtype
from model.bdh.dense import Pass, written_out, written_out_bytes
from model.bdh.elementwise import EAGER, compiled
from model.bdh.fused_layers import Call, bdh_layers
from model.bdh.recurrent import BDHState, step
from model.bdh.tiling import Rotation, Tiling, layers_bytes, rope_frequencies, rotation
from model.interface import HiddenWeight, LanguageModel
from model.matmul import MatmulBackend, OperandId, PlainMatmul, ProjectionFactory

INIT_STD = 0.02
UPSTREAM_FREQUENCIES = "attn.freqs"


class BDH(LanguageModel):
    """The model; `forward(tokens (B, T)) -> logits (B, T, V)`.

    The neurons of a head are stored in two halves: the first members of all rotated pairs, then
    the second members, so that rotation needs no strided access. The reference interleaves them.

    `frequencies` are part of the weights: a model that was grown or merged from others keeps those
    of its parts, which do not follow from its size. They stay in float64 on the CPU, whatever the
    model is moved or cast to: angles are computed there, and some devices have no float64.
    """

    _ddp_params_and_buffers_to_ignore = ("frequencies",)  # backends of devices cannot send it

    matmul_backend: MatmulBackend

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        self.config, self.n_layer = config, config.n_layer
        D, H, V = config.n_embd, config.n_head, config.vocab_size
        N = config.mlp_internal_dim_multiplier * D // H
        self.embed = nn.Embedding(V, D)
        self.encoder = nn.Parameter(torch.empty(H, D, N))  # E
        self.encoder_v = nn.Parameter(torch.empty(H, D, N))  # G
        self.decoder = nn.Parameter(torch.empty(H * N, D))  # F
        self.lm_head = nn.Parameter(torch.empty(D, V))
        self.frequencies: Tensor
        self.register_buffer("frequencies", rope_frequencies(N))  # turns per token, (N/2,)
        self.fused = False  # whether the elementwise passes are compiled
        self.matmul_backend = PlainMatmul()
        self.projections: ProjectionFactory | None = None
        self._rotations: dict[tuple[object, ...], Rotation] = {}
        self.init_weights()

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, D, N."""
        H, D, N = self.encoder.shape
        return H, D, N

    def init_weights(self) -> None:
        """Draws every weight from N(0, 0.02), as the reference does."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """documents (B, T): numbers of the documents; tokens see only those of their own."""
        x = F.layer_norm(self.embed(tokens), (self.config.n_embd,))  # (B, T, D)
        return self.layers(x, documents) @ self.lm_head

    def layers(
        self,
        x: Tensor,
        documents: Tensor | None = None,
        states: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """All layers: x (B, T, D) -> (B, T, D); the others as in `bdh_kernels.Call`."""
        if not x.numel():
            return x
        observed = states is not None or active is not None
        dtype = product_dtype(x)
        weights = (self.encoder, self.encoder_v, self.decoder)
        dropout = self.config.dropout if self.training and not observed else 0.0
        if self.projections is not None and not observed:
            angles = self.rotation(x.shape[1], dtype)
            run = Pass(self.config.n_layer, dropout, angles, documents, self.fused)
            return written_out(x, self.projections(weights), run)
        tiling = self.tiling(x, dtype)
        call = Call(
            n_layer=self.config.n_layer,
            dropout=dropout,
            rotation=self.rotation(tiling.chunk, dtype),
            tiling=tiling,
            backend=self.matmul_backend,
            passes=compiled() if self.fused and not observed else EAGER,
            documents=documents,
            states=states,
            active=active,
        )
        result: Tensor = bdh_layers(x, weights, call)
        return result

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
        """Memory of the state of one sample, the same for any length."""
        H, D, N = self.shape
        return self.config.n_layer * H * N * D * max(4, self.encoder.element_size())

    def init_cache(self, batch_size: int) -> BDHState:
        """Returns the state before the first token: zeros."""
        H, D, N = self.shape
        shape = (self.config.n_layer, H, batch_size, 2, N // 2, D)
        exact = torch.promote_types(self.encoder.dtype, torch.float32)
        return BDHState(
            sums=self.encoder.new_zeros(shape, dtype=exact),
            rows_v=self.encoder_v.detach().mT.reshape(-1, D) if self.encoder.is_cpu else None,
            frequencies=self.frequencies,
        )

    @torch.no_grad()
    def prefill_or_decode(self, tokens: Tensor, cache: BDHState) -> Tensor:
        """Feeds tokens (B, T), which go on where the state ends: the logits after them, (B, V).

        Many tokens are taken in parallel; one costs the same at any position.
        """
        x = F.layer_norm(self.embed(tokens), (self.config.n_embd,))
        if tokens.shape[1] == 1:
            last = step(x[:, 0], (self.encoder, self.encoder_v, self.decoder), cache)
        else:
            cache.turn()
            last = self.layers(x, states=cache.sums)[:, -1]
            cache.frame += self.tiling(x, product_dtype(x)).padded(tokens.shape[1])
        cache.position += tokens.shape[1]
        return last @ self.lm_head

    def tiling(self, x: Tensor, dtype: torch.dtype) -> Tiling:
        """How the layers cut x (B, T, D)."""
        B, T, _ = x.shape
        return Tiling.of((B, T), self.shape, dtype, x.is_cpu)

    def rotation(self, chunk: int, dtype: torch.dtype) -> Rotation:
        """The angles of a chunk; the last ones asked for are kept."""
        key = (chunk, dtype, self.encoder.device)
        if key not in self._rotations:
            if len(self._rotations) >= 4:
                self._rotations.clear()
            with torch.inference_mode(False):  # they are for training too
                self._rotations[key] = rotation(self.frequencies, *key)
        return self._rotations[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BDH:
        """Moves or casts everything but the frequencies, for `to`, `half` and the like."""
        frequencies = self._buffers.pop("frequencies")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch
        self._buffers["frequencies"] = frequencies
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes weights saved before frequencies were: theirs are those of a new model."""
        self._rotations.clear()
        if f"{prefix}frequencies" not in state:
            state = state | {f"{prefix}frequencies": rope_frequencies(self.shape[2])}
        super()._load_from_state_dict(state, prefix, *rest)

    @torch.no_grad()
    def activation_sparsity(
        self, tokens: Tensor, documents: Tensor | None = None
    ) -> dict[str, list[float]]:
        """The share of neurons with s > 0 and with z > 0 in each layer, on tokens (B, T)."""
        active = torch.zeros(self.config.n_layer, 2, dtype=torch.long, device=tokens.device)
        x = F.layer_norm(self.embed(tokens), (self.config.n_embd,))
        self.layers(x, documents, active=active)
        shares = active.cpu().double() / (tokens.numel() * len(self.decoder))
        return {"s": shares[:, 0].tolist(), "z": shares[:, 1].tolist()}

    def compile(self, *, disable: bool = False) -> None:
        """Fuses what lies between the matrix products, which is all that compilers gain here."""
        self.fused = self.matmul_backend.compiled = not disable

    def activation_bytes(
        self, tokens: tuple[int, int], dtype: torch.dtype, on_cpu: bool, adding: bool = False
    ) -> int:
        """Peak memory of a training step on tokens (B, T), weights and their gradients aside.

        dtype: of the matrix products. adding: to the gradients of micro-steps before.
        """
        tiling = Tiling.of(tokens, self.shape, dtype, on_cpu)
        masks = 8 if self.config.dropout > 0 and not self.fused else 0  # hashes take 32 bits
        beside = max(masks, self.matmul_backend.operand_bytes)
        packed, kept, backward = layers_bytes(tokens, self.shape, tiling, dtype, beside)
        forward = packed + self.config.n_layer * kept
        if self.projections is not None:
            layers = (self.shape, dtype, self.config.n_layer)
            forward, backward = written_out_bytes(tokens, *layers)
        embedded = 2 * math.prod(tokens) * self.config.n_embd * 4
        logits = math.prod(tokens) * self.config.vocab_size * 3 * 4  # their logarithm, 2 gradients
        if adding:  # those of all layers come together, at the end
            backward += sum(weight.nbytes for weight, _ in self.hidden_weights())
        return embedded + forward + max(backward, logits)

    def cached_bytes(self, tokens: tuple[int, int], dtype: torch.dtype, on_cpu: bool) -> int:
        """Memory of what stays between steps: the angles of a chunk."""
        tiling = Tiling.of(tokens, self.shape, dtype, on_cpu)
        return tiling.chunk * self.shape[2] * dtype.itemsize

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


def from_upstream(state: Mapping[str, Tensor], config: BDHConfig) -> BDH:
    """A BDH with the weights and frequencies of a state dict in the public reference's layout.

    Raises ValueError for names too many or too few, other shapes and numbers that are not finite.
    """
    model = BDH(config)
    H, _, N = model.shape
    shapes = {name: value.shape for name, value in to_upstream(model).items()}
    state = without_wrappers(state)
    missing = sorted(shapes.keys() - state.keys() - {UPSTREAM_FREQUENCIES})
    if missing:
        raise ValueError(f"upstream BDH weights lack {', '.join(missing)}; found {sorted(state)}")
    if extra := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"no weight of an upstream BDH: {', '.join(extra)}")
    for name, value in state.items():
        if value.shape != shapes[name]:
            expected, found = tuple(shapes[name]), tuple(value.shape)
            raise ValueError(f"upstream BDH weight {name}: expected {expected}, found {found}")
        if not value.isfinite().all():
            raise ValueError(f"upstream BDH weight {name}: holds NaN or infinite numbers")
    order = torch.arange(N).view(-1, 2).mT.reshape(-1)
    own = {name: _reorder(name, value, order, H) for name, value in state.items()}
    if (stored := own.pop(UPSTREAM_FREQUENCIES, None)) is not None:
        own["frequencies"] = _pair_frequencies(stored.flatten())
    model.load_state_dict(own)
    return model


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that DDP and torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod.", "module."):  # either may be around the other
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _pair_frequencies(stored: Tensor) -> Tensor:
    """The frequency of each pair in float64, of those of each neuron in the reference's order.

    The reference stores what it computes in float32. Where that is what a new model has, its exact
    value is taken.
    """
    first, second = stored.double().view(-1, 2).unbind(1)
    if not torch.equal(first, second):
        pair = int((first != second).nonzero()[0])
        raise ValueError(
            f"upstream BDH weight {UPSTREAM_FREQUENCIES}: neurons {2 * pair} and {2 * pair + 1} "
            "are a pair and have two frequencies, which is no rotation"
        )
    usual = rope_frequencies(len(stored))
    return usual if torch.allclose(first, usual, rtol=1e-6, atol=0) else first


def to_upstream(model: BDH) -> dict[str, Tensor]:
    """The model's weights as a state dict that the public reference loads strictly."""
    H, N = model.encoder.shape[0], model.encoder.shape[2]
    order = torch.arange(N).view(2, -1).mT.reshape(-1)
    state = {
        name: _reorder(name, value.detach(), order.to(value.device), H).clone()
        for name, value in model.state_dict().items()
        if name != "frequencies"
    }
    pairs = model.frequencies.float().repeat_interleave(2)
    return state | {UPSTREAM_FREQUENCIES: pairs.view(1, 1, 1, N)}


def _reorder(name: str, value: Tensor, order: Tensor, heads: int) -> Tensor:
    if name in ("encoder", "encoder_v"):
        return value[..., order]
    if name == "decoder":
        return value.view(heads, -1, value.shape[-1])[:, order].reshape(value.shape)
    return value
