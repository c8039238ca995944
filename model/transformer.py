"""What GPT and Llama have in common: tokens -> embedding -> blocks -> norm and head -> logits.

Between the blocks tokens are rows of one matrix (R = B * T, D): the 8-bit products and RMSNorm's
backward pass on a CPU take matrices, and would otherwise flatten x in every layer. Only attention
needs to know B and T.
Training takes whole sequences; generation appends tokens to a cache of keys and values per layer.

B samples, T tokens, R = B * T, D = n_embd, V vocabulary; H heads, K of them of keys and values
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from model.attention import (
    MIN_FLEX_HEAD,
    AttentionMask,
    KVCache,
    capacity,
    decoding_kernels,
    decoding_mask,
    decoding_mask_at,
    dropout,
    training_mask,
)
from model.interface import HiddenWeight, LanguageModel
from model.loss import head_loss
from model.matmul import Linear


@dataclass(frozen=True)
class ForwardContext:
    """What one forward pass gives to all blocks."""

    shape: tuple[int, int]  # B, T
    mask: AttentionMask
    rope_table: Tensor | None = None
    dropout: float = 0.0
    caches: list[KVCache] | None = None
    position: Tensor | None = None  # () on the device, of the token of `decode_at`

    def all_keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values that a layer attends to: k and v (B, K, T, d) in training,
        and in generation all those of its cache, to which k and v are appended."""
        if self.caches is None:
            return k, v
        cache = self.caches[layer]
        return cache.append(k, v) if self.position is None else cache.write(k, v, self.position)


class Transformer(LanguageModel, ABC):
    """Forward, generation and costs; a model defines its embedding, blocks and head."""

    tied = False  # whether head and embedding share their weights
    lm_head: Linear

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None and config.n_embd % config.n_head == 0
        self.config, self.n_layer = config, config.n_layer
        self.vocab_size = config.vocab_size
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The layers; each takes x (R, D) and a `ForwardContext` and returns the next x."""

    @abstractmethod
    def embed(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Returns (B, T, D) of tokens (B, T), of which the first stands at `position`."""

    @abstractmethod
    def final_norm(self, x: Tensor) -> Tensor:
        """Returns the input of the head, (R, D), from x (R, D) after the last block."""

    def shard_groups(self) -> list[list[nn.Module]]:
        return [[block.get_submodule("attn"), block.get_submodule("mlp")] for block in self.blocks]

    def compile_layers(self, *, disable: bool = False) -> None:
        for block in self.blocks:
            block.compile(disable=disable)

    def rope_table(self, begin: int, end: int, x: Tensor) -> Tensor | None:
        """Returns cosines and sines of positions begin .. end - 1; None without rope."""
        return None

    def hidden_weights(self) -> list[HiddenWeight]:
        linears = (module for module in self.blocks.modules() if isinstance(module, Linear))
        return [HiddenWeight(linear.weight, linear.n_fused) for linear in linears]

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        B, T = tokens.shape
        p = self.config.dropout if self.training else 0.0
        x = self.embed(tokens, 0)  # (B, T, D)
        x = dropout(x.to(self.residual_dtype or x.dtype), p)
        mask = training_mask(self.config.attention, x, (B, T), documents, p, self.head_size)
        ctx = ForwardContext((B, T), mask, self.rope_table(0, T, x), p)
        x = x.flatten(0, 1)  # (R, D)
        for block in self.blocks:
            x = self._apply_block(block, x, ctx)
        x = self.final_norm(x)
        if targets is None:
            return self.lm_head(x).view(B, T, -1)
        return head_loss(x, self.lm_head.weight, self.lm_head.bias, targets.flatten())

    def _apply_block(self, block: nn.Module, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Returns block(x, ctx). With `recompute` autograd keeps x alone of it, and computes the
        block again in backward."""
        if not (self.recompute and torch.is_grad_enabled()):
            y: Tensor = block(x, ctx)
            return y
        # Only dropout draws random numbers. Without it no generator has to be saved and put back,
        # which a CUDA graph could not record.
        draws = ctx.dropout > 0
        y = checkpoint(block, x, ctx, use_reentrant=False, preserve_rng_state=draws)
        if not torch.compiler.is_compiling():
            torch.clear_autocast_cache()  # it would hold the casts of all layers' weights
        return y

    def cache_bytes(self, length: int) -> int:
        if self.max_context is not None:
            length = min(length, self.max_context)
        room = capacity(length, self.max_context)
        kept = 2 * self.config.n_layer * self.n_kv_head * self.head_size * room
        return kept * next(self.parameters()).element_size()

    def init_cache(self, batch_size: int, max_length: int | None = None) -> list[KVCache]:
        """Returns empty caches, one per layer; the first tokens allocate them."""
        return [KVCache(self.max_context, max_length) for _ in range(self.config.n_layer)]

    def clear_cache(self, cache: list[KVCache]) -> None:
        for layer in cache:
            layer.length = 0

    @torch.no_grad()
    def prefill_or_decode(self, tokens: Tensor, cache: list[KVCache]) -> Tensor:
        B, T = tokens.shape
        begin = cache[0].length
        x = self.embed(tokens, begin)
        mask = decoding_mask(self.config.attention, x, T, begin + T)
        ctx = ForwardContext((B, T), mask, self.rope_table(begin, begin + T, x), caches=cache)
        x = self._decode(x, ctx)
        return self.lm_head(self.final_norm(x if T == 1 else x.view(B, T, -1)[:, -1]))

    @torch.no_grad()
    def decode_at(self, tokens: Tensor, cache: list[KVCache], position: Tensor) -> Tensor:
        max_length = cache[0].max_length
        assert max_length is not None
        x = self.embed(tokens, position)
        mask = decoding_mask_at(self.config.attention, x, position, max_length)
        table = self.rope_table(0, max_length, x)
        table = None if table is None else table.index_select(1, position.view(1))
        ctx = ForwardContext((len(tokens), 1), mask, table, caches=cache, position=position)
        return self.lm_head(self.final_norm(self._decode(x, ctx)))

    def _decode(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Applies all blocks to new tokens, x (B, T, D); returns rows (B * T, D)."""
        x = x.flatten(0, 1)
        with decoding_kernels(x):
            for block in self.blocks:
                x = block(x, ctx)
        return x

    def notes(self, on_cpu: bool) -> list[str]:
        kind, p = self.config.attention, self.config.dropout
        if kind == "flex" and on_cpu:
            return ["model.attention=flex runs on CUDA only; here masked products take its place"]
        if kind == "flex" and self.head_size < MIN_FLEX_HEAD:
            return [
                f"model.attention=flex takes heads of {MIN_FLEX_HEAD} numbers at least, and these "
                f"have {self.head_size}; masked products take its place"
            ]
        if p and (kind == "flex" or (kind == "flash" and on_cpu)):
            where = " on a CPU" if on_cpu else ""
            return [
                f"model.attention={kind} has no dropout{where}; with model.dropout={p:g} "
                "masked products take its place in training"
            ]
        return []

    def flops_per_token(self, block_size: int) -> int:
        """Returns the FLOPs per token as PaLM's appendix B counts them: every product, with the
        head, and all T x T scores, masked or not; three times for forward and backward."""
        weights = sum(parameter.numel() for parameter, _ in self.hidden_weights())
        weights += self.config.n_embd * self.vocab_size
        scores = 2 * self.config.n_layer * self.config.n_embd * block_size
        passes = 2 if self.frozen else 3  # frozen weights have no gradient
        return 2 * (passes * weights + 3 * scores)

    @property
    def frozen(self) -> bool:
        """Whether adapters have frozen the hidden weights, which then are in 4 bits."""
        return not any(parameter.requires_grad for parameter, _ in self.hidden_weights())
