"""BDH by its definition on whole tensors, small models, and the distance of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import BDHConfig
from model.bdh import BDH
from model.bdh.tiling import rope_frequencies

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""x (B, T, D), encoder (H, D, N), encoder_v (H, D, N), decoder (H * N, D)."""


def bdh_config(**changes: Any) -> BDHConfig:
    values: dict[str, Any] = {
        "n_layer": 3,
        "n_embd": 16,
        "n_head": 2,
        "dropout": 0.0,
        "mlp_internal_dim_multiplier": 4,
        "vocab_size": 64,
    }
    return BDHConfig(**{**values, **changes})


def small_bdh(std: float | None = None, **changes: Any) -> BDH:
    """A model with the same weights at each call; std: of all, so that nothing is near zero."""
    torch.manual_seed(0)
    model = BDH(bdh_config(**changes))
    for parameter in model.parameters() if std else ():
        torch.nn.init.normal_(parameter, std=std or 0.0)
    return model


def reference(
    inputs: Inputs,
    n_layer: int,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """All layers; mask (n_layer, H, B, T, N) is dropout's.

    Under autocast it rounds where the public reference does.
    """
    x, encoder, encoder_v, decoder = inputs
    (B, T, D), (H, _, N) = x.shape, encoder.shape
    phases = torch.outer(torch.arange(T).double(), rope_frequencies(N)) % 1
    cos, sin = (2 * math.pi * phases).cos().to(x.dtype), (2 * math.pi * phases).sin().to(x.dtype)
    cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    seen = torch.ones(T, T, dtype=torch.bool).tril(-1)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    for layer in range(n_layer):
        s = (x @ encoder[:, None]).relu()  # (H, B, T, N)
        first, second = s.chunk(2, -1)
        r = (s * cos).to(s.dtype) + (torch.cat((-second, first), -1) * sin).to(s.dtype)
        a = F.layer_norm(((r @ r.mT) * seen) @ x, (D,))
        z = s * (a @ encoder_v[:, None]).relu()
        if mask is not None:
            z = z * mask[layer] / (1 - dropout)
        y = z.permute(1, 2, 0, 3).reshape(B, T, H * N) @ decoder
        x = F.layer_norm(x + F.layer_norm(y, (D,)), (D,))
    return x


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def documents_of(*rows: Sequence[int]) -> Tensor:
    """(B, T) document numbers from the documents' lengths."""
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    return torch.stack(numbers)
