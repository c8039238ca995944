"""Llama: rotary positions, RMSNorm, a gated MLP (SwiGLU), and grouped queries.

    x = dropout(embed(tokens))
    n_layer times:
        q, k, v = split(wqkv(norm(x)))
        x = x + dropout(wo(attention(rope(q), rope(k), v)))     # H / K queries to a key
        y = norm(x)
        x = x + dropout(w2(silu(w1 y) * (w3 y)))
    logits = lm_head(norm(x))                                   # not tied; no biases anywhere

B batch, T tokens, R = B * T, D = n_embd, H = n_head, K = n_kv_head, d = D / H, V vocabulary

rope rotates the pair (i, i + d/2) of a head at position t by the angle t * theta ** (-2 i / d): the
halves of a head are the first and the second members of its pairs, as in GPT-NeoX and Hugging Face.
w1 and w3 are fused to one matrix, w13, and q, k, v to wqkv: fewer, larger products.

Sources: Touvron et al., arXiv 2302.13971; Shazeer, arXiv 2002.05202 (SwiGLU); Su et al., arXiv
2104.09864 (RoPE); Ainslie et al., arXiv 2305.13245 (grouped queries).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from model.attention import Embedding, attention, dropout
from model.matmul import Linear
from model.transformer import ForwardContext, Transformer

EPS = 1e-5


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight over D numbers, in float32 at least."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and not torch.compiler.is_compiling():
            y: Tensor = _NormOnCPU.apply(x, self.weight)  # type: ignore[no-untyped-call]  # torch
            return y
        # For two dtypes torch has no fused kernel, only the formula in many, and it warns.
        exact = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(exact), self.weight.shape, self.weight.to(exact), EPS)
        return y.to(x.dtype)


class _NormOnCPU(torch.autograd.Function):
    """RMSNorm with a backward pass of its own.

    torch has no kernel for it on CPUs. Its formula, differentiated by autograd, takes about twenty
    passes over the memory and saves more tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = exact.square().mean(-1, keepdim=True).add_(EPS).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        # With y = x s and out = y w: dw = sum(dout y), dx = s (dout w - y mean(dout w y)).
        x, weight, scale = ctx.saved_tensors
        y = x * scale
        g = gradients[0] * y
        weight_gradient = g.sum(0).to(weight.dtype)
        mean = torch.mv(g, weight.to(g.dtype)).div_(x.shape[-1]).unsqueeze_(-1)
        torch.mul(gradients[0], weight, out=g)
        return g.addcmul_(y, mean, value=-1).mul_(scale).to(x.dtype), weight_gradient


def rope_angles(
    begin: int, end: int, width: int, theta: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns cosines (cos, cos) and sines (-sin, sin) of positions begin .. end - 1, (2, T, d) in
    float64: each twice, for both halves of a head; `apply_rope` tells the reason for the minus."""
    exact = partial(torch.arange, dtype=torch.float64, device=device)
    frequencies = theta ** -(exact(0, width, 2) / width)
    angles = torch.outer(exact(begin, end), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates x (B, T, heads, d) by a table (2, T, 1, d), in the dtype of the table.

    The halves (a, b) of a head become (a cos - b sin, b cos + a sin). `roll` makes (b, a) of them,
    and the minus is in the table.
    """
    cos, sin = table.unbind(0)
    exact = x.to(table.dtype)
    return (exact * cos).addcmul(exact.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: x (R, D) -> (R, D)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, H = config.n_embd, config.n_head
        K, d = config.n_kv_head or H, D // H
        self.layer, self.n_head, self.n_kv_head, self.head_size = layer, H, K, d
        # Initialization and Muon take it as n_fused matrices of equal size, (K d, D): the first
        # H / K of them are q, the next one is k, the last one v.
        self.wqkv = Linear(D, (H + 2 * K) * d, bias=False, n_fused=H // K + 2)
        self.wo = Linear(D, D, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        H, K = self.n_head, self.n_kv_head
        heads = self.wqkv(x).view(*ctx.shape, H + 2 * K, self.head_size)
        assert ctx.rope_table is not None
        qk, v = torch.split(heads, [H + K, K], 2)  # (B, T, H + K, d), (B, T, K, d)
        qk = apply_rope(qk, ctx.rope_table).transpose(1, 2)
        q, k = torch.split(qk, [H, K], 1)  # (B, H or K, T, d)
        k, v = ctx.all_keys_values(self.layer, k, v.transpose(1, 2))
        return self.wo(attention(q, k, v, ctx.mask))  # of rows (R, D)


class MLP(nn.Module):
    """SwiGLU: x (R, D) -> (R, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = mlp_width(config)
        self.w13 = Linear(config.n_embd, 2 * width, bias=False, n_fused=2)
        self.w2 = Linear(width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * value)


def mlp_width(config: ModelConfig) -> int:
    """Returns d_ff, by default 8/3 D rounded up to a multiple of 64, as many weights as GPT."""
    return config.d_ff or -(-8 * config.n_embd // (3 * 64)) * 64


class Block(nn.Module):
    """One layer: x (R, D) -> (R, D)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + dropout(self.attn(self.attn_norm(x), ctx), ctx.dropout)
        return x + dropout(self.mlp(self.mlp_norm(x)), ctx.dropout)


class Llama(Transformer):
    """Llama for contexts of any length."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D, V = config.n_embd, self.vocab_size
        self.embedding = Embedding(V, D)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(D)
        self.lm_head = Linear(D, V, bias=False)
        self._rope_tables: dict[tuple[object, ...], Tensor] = {}
        self.init_weights()

    def init_weight(self, name: str, weight: Tensor) -> None:
        """Draws matrices (out, in) from N(0, 2 / (in + out)) and embeddings from N(0, 1), both
        truncated at three standard deviations; gains are 1.

        A fused matrix is drawn as the `n_fused` matrices that it stacks. With grouped queries q is
        several of them, and its numbers are larger than those of one (D, D) matrix would be.
        """
        if weight.dim() == 1:
            weight.fill_(1.0)
            return
        module = self.get_submodule(name.removesuffix(".weight"))
        n_fused = module.n_fused if isinstance(module, Linear) else 1
        std = math.sqrt(2 / (weight.shape[0] // n_fused + weight.shape[1]))
        if module is self.embedding:
            # GPT-2's embeddings of std 0.02 make learning start late: 2.01 instead of 1.85 nats per
            # byte of Shakespeare after 300 steps of 4 layers of 128.
            std = 1.0
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def embed(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        return self.embedding(tokens)

    def final_norm(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y

    def rope_table(self, begin: int, end: int, x: Tensor) -> Tensor:
        """Returns the table of `apply_rope`; it is cached, and doubled when it is too short."""
        exact = torch.promote_types(x.dtype, torch.float32)
        theta = self.config.rope_theta
        if torch.compiler.is_compiling():  # which forbids side effects
            # On the device: compiled code would compute it on the CPU and copy it in every step.
            device = "cpu" if x.device.type == "mps" else x.device  # mps has no float64
            table = rope_angles(begin, end, self.head_size, theta, device)
            return table.to(x.device, exact).unsqueeze(2)
        key = (exact, x.device)
        if key not in self._rope_tables or self._rope_tables[key].shape[1] < end:
            with torch.inference_mode(False):  # training may use what an evaluation made
                table = rope_angles(0, 1 << (end - 1).bit_length(), self.head_size, theta)
                self._rope_tables[key] = table.to(x.device, exact).unsqueeze(2)
        return self._rope_tables[key][:, begin:end]

    def embedding_and_head(self) -> tuple[Tensor, Tensor]:
        return self.embedding.weight, self.lm_head.weight
