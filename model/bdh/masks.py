"""Which tokens attend to which, and which elements dropout keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bdh.tiling import Geometry

_SALT = 0x5DEECE66D  # makes the hash of neuron i differ from that of token i
_LOW_32_BITS = 2**32 - 1


class ChunkMasks:
    """Masks of attention within chunks of C tokens, and across their borders, true where

    hidden         (1 or X, C, C)  a query may not see a key of its chunk
    sees_state     (X, C, 1)       a token's query reads the state before its chunk: its document
                                   began before the chunk
    enters_state   (X, C, 1)       a token is added to the state after its chunk: its document goes
                                   on to the chunk's end
    carries_state  (K, B, 1, 1)    the state before a chunk goes on into the state after it: one
                                   document covers the chunk and began before it

    Without documents the last three are None: true everywhere.

    documents (B, K, C) are the numbers given, padded by that of the last token; or None.
    """

    def __init__(
        self, documents: Tensor | None, sizes: tuple[int, int, int], device: torch.device
    ) -> None:
        """documents (B, T): a number per document; sizes: (B, K, C)."""
        B, K, C = sizes
        # The diagonal is hidden too: BDH's attention is strictly causal.
        self.hidden = torch.ones(1, C, C, dtype=torch.bool, device=device).triu()
        self.documents: Tensor | None = None
        self.sees_state = self.enters_state = self.carries_state = None
        if documents is None:
            return
        padding = K * C - documents.shape[1]
        ids = torch.cat((documents, documents[:, -1:].expand(B, padding)), 1).view(B, K, C)
        self.documents = ids
        same = ids[..., None] == ids[..., None, :]
        self.hidden = self.hidden | ~same.view(B * K, C, C)
        last = ids[..., -1:]
        before = torch.cat((ids[:, :1, :1], last[:, :-1]), 1)  # the last token of chunk k - 1
        self.sees_state = (ids == before).view(B * K, C, 1)
        self.enters_state = (ids == last).view(B * K, C, 1)
        self.carries_state = (last == before).view(B, K, 1, 1).transpose(0, 1)  # (K, B, 1, 1)


class DropoutMask(NamedTuple):
    """Which elements of a tile dropout keeps: those with hash(rows + columns) >= threshold."""

    rows: Tensor  # (X, C, 1) int32, random per layer and token
    columns: Tensor  # (g, 1, 1, n) int32, random per neuron
    threshold: int


class HashDropout:
    """Dropout without a stored mask: a hash of seed, layer, token and neuron decides.

    A stored mask would be as large as the tensors that tiling avoids, and one drawn tile by tile
    would depend on the tiling. Backward computes the same hashes again.
    """

    def __init__(
        self,
        probability: float,
        seed: Tensor,
        n_layer: int,
        geo: Geometry,
        device: torch.device,
        first_token: int = 0,
    ) -> None:
        """seed: () int64, on the device. first_token: tokens in the sequences before these."""
        dropped = min(round(probability * 2**32), 2**32 - 1)  # of all 2**32 hashes
        self.scale = 2**32 / (2**32 - dropped)
        self._threshold = dropped - 2**31
        tokens = torch.arange(first_token, first_token + geo.B * geo.T, device=device)
        tokens = tokens.view(1, geo.B, geo.T)
        layers = torch.arange(n_layer, device=device).view(-1, 1, 1) << 40
        # Tokens are numbered before they are padded to whole chunks, and neurons before they are
        # cut into tiles: the cuts do not change which elements are dropped.
        rows = F.pad(_hash(tokens + seed + layers), (0, geo.K * geo.C - geo.T))
        self._rows = rows.view(n_layer, geo.X, geo.C, 1)
        neurons = torch.arange(geo.H * geo.N, device=device)
        self._columns = _hash(neurons + (seed ^ _SALT)).view(geo.H, 2, -1)

    def mask(self, layer: int, heads: slice, pairs: slice) -> DropoutMask:
        """Returns the mask of one tile: of some heads, some pairs of neurons."""
        columns = self._columns[heads, :, pairs]
        columns = columns.reshape(len(columns), 1, 1, -1)
        return DropoutMask(self._rows[layer], columns, self._threshold)


def _hash(keys: Tensor) -> Tensor:
    """Returns int32 that look random from integers of any shape: the finaliser of splitmix64."""
    x = keys.to(torch.int64)
    for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        # torch shifts int64 arithmetically; the mask makes it a logical shift.
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * (odd - 2**64)
    x = (x ^ ((x >> 31) & (2**33 - 1))) & _LOW_32_BITS
    return (x - 2**31).to(torch.int32)
