"""What transformers are made of: attention by one of three kernels, and the cache of its keys.

All three compute softmax(q k^T / sqrt(d)) v and agree up to rounding:

    sdpa    torch's scaled_dot_product_attention: tiled where it can be, no T x T matrix in memory
    plain   its formula, T x T: shows every product; and on a CPU, where torch tiles none with
            dropout, it stays in the dtype of the products, unlike torch's own
    flex    FlexAttention: skips blocks of tokens that see nothing of each other. CUDA only (no
            backward pass elsewhere), and without dropout

B samples, T tokens, S tokens seen, H heads, K heads of keys and values (H is a multiple), d width
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# torch keeps compiled code on disk, for whichever CPU: what was for AVX-512 computed nonsense in a
# process that was told to use AVX2, and would on another machine with the same home.
torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()

Kernel = Literal["sdpa", "plain", "flex"]
_FIRST_CAPACITY = 64  # tokens
# Up to here torch's backward pass on a CPU takes longer in 16 bits than the formula: 3 times at 64.
_SHORT = 256  # tokens


class Embedding(nn.Embedding):
    """An embedding that does not initialize its weights, since models do."""

    def reset_parameters(self) -> None:
        pass


@dataclass(frozen=True)
class Sight:
    """Which tokens see which, by which kernel; the same in all layers of a pass."""

    kernel: Kernel
    causal: bool = True  # whether that alone says it all; else bias or blocks, or all see all
    bias: Tensor | None = None  # (T, S) or (B, 1, T, S): 0 where seen, else -inf
    blocks: BlockMask | None = None
    dropout: float = 0.0  # of the probabilities


def look(
    kind: str, x: Tensor, shape: tuple[int, int], documents: Tensor | None, dropout: float
) -> Sight:
    """What tokens (B, T) = shape see: those before them, and of their own document where given.

    kind: `model.attention`. x tells device and dtype. documents (B, T): one document, one number.
    """
    if x.is_cuda and not dropout and (kind == "flex" or (kind == "auto" and documents is not None)):
        return Sight("flex", causal=False, blocks=_block_mask(documents, shape, x.device))
    written_out = x.is_cpu and is_plain_on_cpu(kind, shape[1], product_dtype(x).itemsize, dropout)
    kernel: Kernel = "plain" if kind == "math" or written_out else "sdpa"
    if documents is not None:
        apart = documents[:, None, :, None] != documents[:, None, None, :]
        bias = causal_bias(shape[1], shape[1], x).masked_fill(apart, -torch.inf)
        return Sight(kernel, causal=False, bias=bias, dropout=dropout)
    if kernel == "plain":
        bias = causal_bias(shape[1], shape[1], x)
        return Sight(kernel, causal=False, bias=bias, dropout=dropout)
    return Sight(kernel, dropout=dropout)


def is_plain_on_cpu(kind: str, tokens: int, size: int, dropout: float) -> bool:
    """Whether training there holds all scores; size: bytes of an element of the products."""
    return kind == "math" or dropout > 0 or (kind == "auto" and size < 4 and tokens <= _SHORT)


def look_back(kind: str, x: Tensor, tokens: int, seen: int) -> Sight:
    """What the last `tokens` of `seen` tokens see, in generation."""
    kernel: Kernel = "plain" if kind == "math" else "sdpa"
    if tokens == 1:
        return Sight(kernel, causal=False)
    if tokens == seen and kernel == "sdpa":
        return Sight(kernel)
    return Sight(kernel, causal=False, bias=causal_bias(tokens, seen, x))


def causal_bias(tokens: int, seen: int, x: Tensor) -> Tensor:
    """(T, S), in the dtype of products on x: -inf where the last T of S tokens see later ones."""
    full = x.new_full((tokens, seen), -torch.inf, dtype=product_dtype(x))
    return full.triu_(seen - tokens + 1)


def attention(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """q (B, H, T, d), k and v (B, K, S, d), of any strides -> rows (B * T, H * d)."""
    B, H, T, d = q.shape
    grouped = k.shape[1] != H
    if sight.kernel == "plain":
        y = _plain(q, k, v, sight)
    elif sight.kernel == "flex":
        y = _flex()(q, k, v, block_mask=sight.blocks, enable_gqa=grouped)
    else:
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=sight.bias,
            dropout_p=sight.dropout,
            is_causal=sight.causal,
            enable_gqa=grouped,
        )
    return y.transpose(1, 2).reshape(B * T, H * d)


def _plain(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """The heads that share keys are rows of one product: none is repeated."""
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    queries, keys = (q * d**-0.5).reshape(B * K, H // K * T, d), k.reshape(B * K, S, d).mT
    if sight.bias is not None and sight.bias.dim() == 2 and H == K:
        scores = torch.baddbmm(sight.bias, queries, keys)
    else:
        scores = torch.bmm(queries, keys).view(B, K, H // K, T, S)
        if sight.bias is not None:
            scores = scores + sight.bias.unsqueeze(-3)
    weights = drop(scores.softmax(-1), sight.dropout).view(B * K, H // K * T, S)
    return torch.bmm(weights, v.reshape(B * K, S, d)).view(B, H, T, d)


def _block_mask(
    documents: Tensor | None, shape: tuple[int, int], device: torch.device
) -> BlockMask:
    """Which blocks of tokens (B, T) see each other, and within them which tokens."""
    B, T = shape

    def causal(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def causal_document(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert documents is not None
        return (query >= key) & (documents[b, query] == documents[b, key])

    if documents is None:
        return create_block_mask(causal, None, None, T, T, device=device)
    return create_block_mask(causal_document, B, None, T, T, device=device)


def _flex() -> Any:
    """FlexAttention is a kernel only where it is compiled; within a compiled model it is."""
    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def drop(x: Tensor, share: float) -> Tensor:
    """Dropout; nothing at all at 0."""
    return F.dropout(x, share) if share else x


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products on x: autocast's, or x's own."""
    kind = x.device.type
    lowered = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if lowered and x.dtype is not torch.float64 else x.dtype


class KVCache:
    """Keys and values of the tokens one layer has seen; appending copies nothing but the new ones,
    save when the capacity doubles."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit  # tokens there can be at most
        self.length = 0
        self.keys: Tensor | None = None  # (B, K, capacity, d), in the dtype of the first ones
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes k and v (B, K, T, d); all there are now, (B, K, S, d) each."""
        tokens = k.shape[2]
        begin, self.length = self.length, self.length + tokens
        if self.keys is None or self.values is None or self.keys.shape[2] < self.length:
            self.keys, self.values = self._grown(self.keys, k), self._grown(self.values, v)
        self.keys.narrow(2, begin, tokens).copy_(k)
        self.values.narrow(2, begin, tokens).copy_(v)
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def _grown(self, kept: Tensor | None, like: Tensor) -> Tensor:
        B, K, _, d = like.shape
        larger = like.new_empty(B, K, capacity(self.length, self.limit), d)
        if kept is not None:
            larger.narrow(2, 0, kept.shape[2]).copy_(kept)
        return larger


def capacity(length: int, limit: int | None) -> int:
    """The tokens that a cache of so many has room for: the next power of two."""
    room = max(_FIRST_CAPACITY, 1 << (length - 1).bit_length())
    return room if limit is None else min(room, limit)
