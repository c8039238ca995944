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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import BDHConfig

ROPE_THETA = 2.0**16
INIT_STD = 0.02


class BDH(nn.Module):
    """The model; `forward(tokens (B, T)) -> logits (B, T, V)`.

    The neurons of a head are stored in two halves: the first members of all rotated pairs, then
    the second members, so that rotation needs no strided access. The reference interleaves them.
    """

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        self.config = config
        D, H, V = config.n_embd, config.n_head, config.vocab_size
        N = config.mlp_internal_dim_multiplier * D // H
        self.embed = nn.Embedding(V, D)
        self.encoder = nn.Parameter(torch.empty(H, D, N))  # E
        self.encoder_v = nn.Parameter(torch.empty(H, D, N))  # G
        self.decoder = nn.Parameter(torch.empty(H * N, D))  # F
        self.lm_head = nn.Parameter(torch.empty(D, V))
        self.register_buffer("frequencies", rope_frequencies(N), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws every weight from N(0, 0.02), as the reference does."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        frequencies = self.get_buffer("frequencies")
        rotation = rope_rotation(tokens.shape[1], frequencies)
        dropout = self.config.dropout if self.training else 0.0
        x = _layer_norm(self.embed(tokens))  # (B, T, D)
        for _ in range(self.config.n_layer):
            y = bdh_layer(x, (self.encoder, self.encoder_v, self.decoder), rotation, dropout)
            x = _layer_norm(x + _layer_norm(y))
        return x @ self.lm_head

    def flops_per_token(self, block_size: int) -> int:
        """Forward and backward (three times forward), counting the causal half of attention."""
        D, H, N = self.encoder.shape[1], self.encoder.shape[0], self.encoder.shape[2]
        projections = 3 * 2 * D * H * N
        attention = (
            block_size * H * (N + D)
        )  # (T / 2 pairs) x 2 FLOPs x (scores over N, sum over D)
        head = 2 * D * self.config.vocab_size
        return 3 * (self.config.n_layer * (projections + attention) + head)


def bdh_layer(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
    dropout: float,
) -> Tensor:
    """One layer before its residual: x (B, T, D) -> (B, T, D).

    weights: encoder (H, D, N), encoder_v (H, D, N), decoder (H*N, D); rotation: cosine and sine,
    each (T, N/2). Every wide tensor is (H, B, T, N); this is the only place where width N exists.
    """
    encoder, encoder_v, decoder = weights
    B, T, D = x.shape
    H, _, N = encoder.shape
    s = torch.relu(x.view(B * T, D) @ encoder).view(H, B, T, N)
    r = rotate(s, rotation)
    scores = (r @ r.mT).tril(diagonal=-1)  # (H, B, T, T)
    a = _layer_norm(scores @ x.to(scores.dtype))  # (H, B, T, D)
    y = torch.relu(a.view(H, B * T, D) @ encoder_v).view(H, B, T, N)
    z = F.dropout(s * y, dropout, training=dropout > 0.0)
    heads = z.view(H, B * T, N) @ decoder.view(H, N, D)  # (H, B*T, D)
    return heads.sum(dim=0, dtype=x.dtype).view(B, T, D)


def rope_frequencies(neurons: int) -> Tensor:
    """Turns per token of each pair (N/2,): theta ** (-2i/N) / (2 pi), in float32."""
    exponent = torch.arange(0, neurons, 2, dtype=torch.float32) / neurons
    return ROPE_THETA**-exponent / (2 * math.pi)


def rope_rotation(length: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, N/2) of each position's angle.

    Phases are counted in turns and reduced modulo one before the cosine: at large positions the
    angle itself would have no digits left after the point.
    """
    positions = torch.arange(length, device=frequencies.device, dtype=frequencies.dtype)
    angles = torch.outer(positions, frequencies).remainder(1.0) * (2 * math.pi)
    return angles.cos(), angles.sin()


def rotate(s: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (s[..., i], s[..., N/2 + i]) by their position's angle; (..., T, N)."""
    cos, sin = (part.to(s.dtype) for part in rotation)
    first, second = s.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def from_upstream(state: dict[str, Tensor], config: BDHConfig) -> BDH:
    """A BDH with the weights of a state dict in the public reference's layout.

    `attn.freqs` is a constant and ignored. Raises ValueError on missing names or other shapes.
    """
    model = BDH(config)
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    if missing:
        raise ValueError(f"upstream BDH weights lack {', '.join(missing)}; found {sorted(state)}")
    H, N = model.encoder.shape[0], model.encoder.shape[2]
    for name, value in own.items():
        if state[name].shape != value.shape:
            expected, found = tuple(value.shape), tuple(state[name].shape)
            raise ValueError(f"upstream BDH weight {name}: expected {expected}, found {found}")
        value.copy_(_reorder(name, state[name], torch.arange(N).view(-1, 2).mT.reshape(-1), H))
    return model


def to_upstream(model: BDH) -> dict[str, Tensor]:
    """The model's weights as a state dict that the public reference loads strictly."""
    H, N = model.encoder.shape[0], model.encoder.shape[2]
    order = torch.arange(N).view(2, -1).mT.reshape(-1)
    state = {
        name: _reorder(name, value.detach(), order.to(value.device), H).clone()
        for name, value in model.state_dict().items()
    }
    state["attn.freqs"] = rope_frequencies(N).repeat_interleave(2).view(1, 1, 1, N)
    return state


def _reorder(name: str, value: Tensor, order: Tensor, heads: int) -> Tensor:
    if name in ("encoder", "encoder_v"):
        return value[..., order]
    if name == "decoder":
        return value.view(heads, -1, value.shape[-1])[:, order].reshape(value.shape)
    return value
