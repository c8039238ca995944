"""GPT-2: learned positions, pre-norm blocks with an MLP, and a head tied to the embedding.

    x = dropout(wte(tokens) + wpe(0 .. T-1))
    n_layer times:
        q, k, v = split(c_attn(ln_1(x)))
        x = x + dropout(c_proj(attention(q, k, v)))     # dropout of its probabilities too
        x = x + dropout(c_proj(act(c_fc(ln_2(x)))))
    logits = lm_head(ln_f(x))                           # lm_head = wte where tied

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Weights have
the names of nanoGPT, whose state dicts load as they are. Each kind of bias can be left out.

B batch, T tokens, R = B * T, D = n_embd, H = n_head, d = D / H, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from model.attention import Embedding, attention, dropout
from model.matmul import Linear
from model.transformer import ForwardContext, Transformer

INIT_STD = 0.02
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def _bias(config: ModelConfig, own: bool | None) -> bool:
    """Returns the option of one kind of bias, which follows `model.bias` if it is null."""
    return config.bias if own is None else own


class LayerNorm(nn.LayerNorm):
    """A layer norm over D numbers, with or without bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.n_embd, eps=1e-5, bias=_bias(config, config.ln_bias))


class Attention(nn.Module):
    """Multi-head attention: x (R, D) -> (R, D)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D = config.n_embd
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = Linear(D, 3 * D, bias=_bias(config, config.attn_bias), n_fused=3)
        self.c_proj = Linear(D, D, bias=_bias(config, config.proj_bias))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        parts = self.c_attn(x).view(*ctx.shape, 3, self.n_head, -1)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))  # (B, H, T, d)
        k, v = ctx.all_keys_values(self.layer, k, v)
        return self.c_proj(attention(q, k, v, ctx.mask))  # of rows (R, D)


class MLP(nn.Module):
    """Two linear layers with an activation between them: x (R, D) -> (R, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width = config.n_embd, config.mlp_scale_factor * config.n_embd
        bias = _bias(config, config.mlp_bias)
        self.c_fc = Linear(D, width, bias=bias)
        self.c_proj = Linear(width, D, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """One layer: x (R, D) -> (R, D)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + dropout(self.attn(self.ln_1(x), ctx), ctx.dropout)
        return x + dropout(self.mlp(self.ln_2(x)), ctx.dropout)


class Trunk(nn.Module):
    """Everything but the head, under the name that nanoGPT and Hugging Face give it."""

    def __init__(self, config: ModelConfig, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.wte = Embedding(vocab_size, config.n_embd)
        self.wpe = Embedding(block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config)


class GPT(Transformer):
    """GPT-2 for contexts of up to block_size tokens."""

    max_context: int

    def __init__(self, config: ModelConfig, block_size: int) -> None:
        super().__init__(config)
        self.max_context = block_size
        self.transformer = Trunk(config, self.vocab_size, block_size)
        self.lm_head = Linear(config.n_embd, self.vocab_size, bias=config.cls_head_bias)
        self.tied = config.tie_embeddings
        if self.tied:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weight(self, name: str, weight: Tensor) -> None:
        """Draws from N(0, 0.02**2); biases are 0, gains 1."""
        if weight.dim() == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        # Two layers in each block write to the residual stream. They start smaller, so that the
        # variance of the stream does not grow with depth.
        residual = INIT_STD / math.sqrt(2 * self.config.n_layer)
        weight.normal_(std=residual if name.endswith("c_proj.weight") else INIT_STD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        """Keeps embedding and head tied where torch makes new parameters, as `to_empty` does."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch
        if self.tied:
            self.lm_head.weight = self.transformer.wte.weight
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    def embed(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Returns (B, T, D); raises ValueError beyond the last learned position."""
        if isinstance(position, Tensor):
            return self.transformer.wte(tokens) + self.transformer.wpe(position)
        end = position + tokens.shape[1]
        if end > self.max_context:
            raise ValueError(f"{end} tokens, but this GPT has learned {self.max_context} positions")
        return self.transformer.wte(tokens) + self.transformer.wpe.weight[position:end]

    def final_norm(self, x: Tensor) -> Tensor:
        y: Tensor = self.transformer.ln_f(x)
        return y

    def embedding_and_head(self) -> tuple[Tensor, Tensor]:
        return self.transformer.wte.weight, self.lm_head.weight
