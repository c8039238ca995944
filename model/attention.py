"""Attention of transformers by one of three kernels, and the cache of keys and values.

All three compute softmax(q k^T / sqrt(d)) v and agree up to rounding:

    sdpa    torch's scaled_dot_product_attention: tiled where possible, without a T x T matrix
    math    the formula, T x T: needed on a CPU with dropout, where torch falls back to a version in
            float32; and the fastest for short sequences in 16 bits on a CPU
    flex    FlexAttention: skips blocks of tokens that see nothing of each other. CUDA only (no
            backward pass elsewhere), without dropout, and from a head width of 16 on

B samples, T tokens, S tokens seen, H heads, K heads of keys and values (H is a multiple), d width
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Kernel = Literal["sdpa", "math", "flex"]
_FIRST_CAPACITY = 64  # tokens
MIN_FLEX_HEAD = 16  # head width: the smallest that Triton multiplies on tensor cores
# Up to this length SDPA's backward pass on a CPU takes longer in 16 bits than the formula does: 3
# times at 64 tokens.
_SHORT_CPU_TOKENS = 256


class Embedding(nn.Embedding):
    """An embedding that does not initialize its weights, since models do."""

    def reset_parameters(self) -> None:
        pass

    if TYPE_CHECKING:  # nn.Module declares calls as Any

        def __call__(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class AttentionMask:
    """Which tokens see which, and the kernel that computes it; the same for all layers."""

    kernel: Kernel
    is_causal: bool = True
    """Whether the mask is the causal one; if not, it is `bias` or `blocks`, or all is seen."""
    bias: Tensor | None = None  # (T, S) or (B, 1, T, S): 0 where seen, else -inf
    blocks: BlockMask | None = None
    dropout: float = 0.0  # of the probabilities


def training_mask(
    kind: str,
    x: Tensor,
    shape: tuple[int, int],
    documents: Tensor | None,
    dropout: float,
    head_size: int,
) -> AttentionMask:
    """Returns the mask of whole sequences, shape (B, T): causal, and within documents if given.

    kind: `model.attention`. x: any activation, for its device and dtype. documents (B, T): a number
    per document.
    """
    wants_flex = kind == "flex" or (kind == "auto" and documents is not None)
    if x.is_cuda and wants_flex and not dropout and head_size >= MIN_FLEX_HEAD:
        return AttentionMask(
            "flex", is_causal=False, blocks=_block_mask(documents, shape, x.device)
        )
    math_on_cpu = x.is_cpu and uses_math_on_cpu(kind, shape[1], matmul_dtype(x).itemsize, dropout)
    kernel: Kernel = "math" if kind == "math" or math_on_cpu else "sdpa"
    if documents is not None:
        apart = documents[:, None, :, None] != documents[:, None, None, :]
        bias = causal_bias(shape[1], shape[1], x).masked_fill(apart, -torch.inf)
        return AttentionMask(kernel, is_causal=False, bias=bias, dropout=dropout)
    if kernel == "math":
        bias = causal_bias(shape[1], shape[1], x)
        return AttentionMask(kernel, is_causal=False, bias=bias, dropout=dropout)
    return AttentionMask(kernel, dropout=dropout)


def uses_math_on_cpu(kind: str, tokens: int, itemsize: int, dropout: float) -> bool:
    """Whether training on a CPU computes all T x T scores; itemsize: of the matmul dtype."""
    short = itemsize < 4 and tokens <= _SHORT_CPU_TOKENS
    return kind == "math" or dropout > 0 or (kind == "auto" and short)


def decoding_mask(kind: str, x: Tensor, tokens: int, seen: int) -> AttentionMask:
    """Returns the mask of the last `tokens` of `seen` tokens, for generation with a cache."""
    kernel: Kernel = "math" if kind == "math" else "sdpa"
    if tokens == 1:
        return AttentionMask(kernel, is_causal=False)
    if tokens == seen and kernel == "sdpa":
        return AttentionMask(kernel)
    return AttentionMask(kernel, is_causal=False, bias=causal_bias(tokens, seen, x))


def decoding_mask_at(kind: str, x: Tensor, position: Tensor, max_length: int) -> AttentionMask:
    """Returns the mask of one token at a position () on the device, in a cache of this length."""
    hidden = torch.arange(max_length, device=x.device) > position
    bias = x.new_zeros(1, max_length, dtype=matmul_dtype(x)).masked_fill(hidden, -torch.inf)
    return AttentionMask("math" if kind == "math" else "sdpa", is_causal=False, bias=bias)


def decoding_kernels(x: Tensor) -> AbstractContextManager[None]:
    """Returns a context in which sdpa does not choose cuDNN's attention, for generation.

    cuDNN plans each new shape anew, and a growing cache has another one with every token.
    """
    if not x.is_cuda:
        return nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: AbstractContextManager[None] = sdpa_kernel(kernels)
    return context


def causal_bias(tokens: int, seen: int, x: Tensor) -> Tensor:
    """Returns (T, S) in x's matmul dtype: -inf where the last T of S tokens see later ones."""
    full = x.new_full((tokens, seen), -torch.inf, dtype=matmul_dtype(x))
    return full.triu_(seen - tokens + 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Returns rows (B * T, H * d) from q (B, H, T, d), k and v (B, K, S, d), of any strides."""
    B, H, T, d = q.shape
    grouped = k.shape[1] != H
    if mask.kernel == "math":
        y = _math_attention(q, k, v, mask)
    elif mask.kernel == "flex":
        y = _compiled(flex_attention)(q, k, v, block_mask=mask.blocks, enable_gqa=grouped)
    else:
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask.bias,
            dropout_p=mask.dropout,
            is_causal=mask.is_causal,
            enable_gqa=grouped,
        )
    return y.transpose(1, 2).reshape(B * T, H * d)


def _math_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    # The H / K heads that share a head of keys become rows of one product: no key is repeated.
    queries, keys = (q * d**-0.5).reshape(B * K, H // K * T, d), k.reshape(B * K, S, d).mT
    if mask.bias is not None and mask.bias.dim() == 2 and H == K:
        scores = torch.baddbmm(mask.bias, queries, keys)  # saves a pass over the scores
    else:
        scores = torch.bmm(queries, keys).view(B, K, H // K, T, S)
        if mask.bias is not None:
            scores = scores + mask.bias.unsqueeze(-3)
    weights = dropout(scores.softmax(-1), mask.dropout).view(B * K, H // K * T, S)
    return torch.bmm(weights, v.reshape(B * K, S, d)).view(B, H, T, d)


def _block_mask(
    documents: Tensor | None, shape: tuple[int, int], device: torch.device
) -> BlockMask:
    B, T = shape

    def causal(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def causal_document(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert documents is not None
        return (query >= key) & (documents[b, query] == documents[b, key])

    create = _compiled(create_block_mask)
    if documents is None:
        blocks: BlockMask = create(causal, None, None, T, T, device=device)
    else:
        blocks = create(causal_document, B, None, T, T, device=device)
    return blocks


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled function: without compilation FlexAttention computes all scores instead of
    running its kernel, and makes its blocks from tensors (B, T, T)."""
    return function if torch.compiler.is_compiling() else _compile_once(function)


@cache
def _compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


def dropout(x: Tensor, p: float) -> Tensor:
    """Applies dropout; p = 0 returns x itself and draws nothing."""
    return F.dropout(x, p) if p else x


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of matrix products with x: autocast's if it is on, else x's own."""
    device = x.device.type
    # "meta" has no autocast. torch 2.11 cannot compile a call of `is_autocast_available`.
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    # Autocast leaves float64 alone.
    return torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype


class KVCache:
    """Keys and values of the tokens that one layer has seen.

    Appending copies the new tokens only, except when the capacity doubles.
    """

    def __init__(self, limit: int | None, max_length: int | None = None) -> None:
        self.limit = limit  # the most tokens there can be; None: any number
        self.max_length = max_length  # tokens to allocate at first; None: the cache grows
        self.length = 0
        self.keys: Tensor | None = None  # (B, K, capacity, d), in the dtype of the first ones
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v (B, K, T, d); returns views of all keys and values, (B, K, S, d)."""
        tokens = k.shape[2]
        begin, self.length = self.length, self.length + tokens
        if self.keys is None or self.values is None or self.keys.shape[2] < self.length:
            self.keys, self.values = self._grown(self.keys, k), self._grown(self.values, v)
        self.keys.narrow(2, begin, tokens).copy_(k)
        self.values.narrow(2, begin, tokens).copy_(v)
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def write(self, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v (B, K, 1, d) of one token at a position () on the device; returns the keys
        and values of the whole cache, filled or not, (B, K, max_length, d)."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, position.view(1), k.to(self.keys.dtype))
        self.values.index_copy_(2, position.view(1), v.to(self.values.dtype))
        return self.keys, self.values

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        B, K, _, d = like.shape
        if self.max_length is not None:  # zeros: `write` returns what is not filled yet too
            assert old is None and self.length <= self.max_length, "the cache is full"
            return like.new_zeros(B, K, self.max_length, d)
        larger = like.new_empty(B, K, capacity(self.length, self.limit), d)
        if old is not None:
            larger.narrow(2, 0, old.shape[2]).copy_(old)
        return larger


def capacity(length: int, limit: int | None) -> int:
    """Returns the tokens that a cache of this length has room for: the next power of two."""
    room = max(_FIRST_CAPACITY, 1 << (length - 1).bit_length())
    return room if limit is None else min(room, limit)
