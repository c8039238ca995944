"""What GPT and Llama have in common: tokens -> embedding -> blocks -> norm and head -> logits.

Between the blocks tokens are rows of one matrix (R = B * T, D), as matrix products take them. A
pass is training on whole sequences or, with caches, generation that goes on where the last ended.

B samples, T tokens, R = B * T, D = n_embd, V vocabulary; H heads, K of them of keys and values
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from config import ModelConfig
from model.attention import KVCache, Sight, capacity, drop, look, look_back
from model.interface import HiddenWeight, LanguageModel
from model.matmul import Linear


@dataclass(frozen=True)
class Pass:
    """What all blocks of one pass share."""

    shape: tuple[int, int]  # B, T
    sight: Sight
    positions: Any = None  # what the model needs to know of them
    dropout: float = 0.0
    caches: list[KVCache] | None = None

    def remember(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer attends to, given those (B, K, T, d) of the pass."""
        return (k, v) if self.caches is None else self.caches[layer].append(k, v)


class Transformer(LanguageModel, ABC):
    """Forward, generation and costs; models say how they embed, what a block is, how they end."""

    tied = False  # whether the head is the embedding

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None and config.n_embd % config.n_head == 0
        self.config, self.n_layer = config, config.n_layer
        self.vocab_size = config.vocab_size
        self.kv_heads = config.n_kv_head or config.n_head
        self.width = config.n_embd // config.n_head

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """Each takes x (R, D) and a `Pass`, and returns the next x."""

    @abstractmethod
    def embed(self, tokens: Tensor, position: int) -> Tensor:
        """(B, T, D) of tokens (B, T) that stand at `position` and after."""

    @abstractmethod
    def head(self, x: Tensor) -> Tensor:
        """Logits (R, V) of x (R, D)."""

    def positions(self, begin: int, end: int, x: Tensor) -> Any:
        """What blocks need to know of the positions."""

    def hidden_weights(self) -> list[HiddenWeight]:
        linears = (module for module in self.blocks.modules() if isinstance(module, Linear))
        return [HiddenWeight(linear.weight, linear.n_fused) for linear in linears]

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """documents (B, T): numbers of the documents; tokens see only those of their own."""
        B, T = tokens.shape
        dropout = self.config.dropout if self.training else 0.0
        x = drop(self.embed(tokens, 0), dropout)
        sight = look(self.config.attention, x, (B, T), documents, dropout)
        run = Pass((B, T), sight, self.positions(0, T, x), dropout)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, run)
        return self.head(x).view(B, T, -1)

    def cache_bytes(self, length: int) -> int:
        """Memory of the keys and values of one sample of so many tokens."""
        if self.max_context is not None:
            length = min(length, self.max_context)
        room = capacity(length, self.max_context)
        kept = 2 * self.config.n_layer * self.kv_heads * self.width * room
        return kept * next(self.parameters()).element_size()

    def init_cache(self, batch_size: int) -> list[KVCache]:
        """Returns empty caches, one per layer; the first tokens allocate them."""
        return [KVCache(self.max_context) for _ in range(self.config.n_layer)]

    @torch.no_grad()
    def prefill_or_decode(self, tokens: Tensor, cache: list[KVCache]) -> Tensor:
        """Feeds tokens (B, T), which go on where the state ends: the logits after them, (B, V)."""
        B, T = tokens.shape
        begin = cache[0].length
        x = self.embed(tokens, begin)
        sight = look_back(self.config.attention, x, T, begin + T)
        run = Pass((B, T), sight, self.positions(begin, begin + T, x), caches=cache)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, run)
        return self.head(x if T == 1 else x.view(B, T, -1)[:, -1])

    def notes(self, on_cpu: bool) -> list[str]:
        """Where attention is not computed as `model.attention` asks."""
        kind, dropout = self.config.attention, self.config.dropout
        if kind == "flex" and on_cpu:
            return ["model.attention=flex runs on CUDA only; here masked products take its place"]
        if dropout and (kind == "flex" or (kind == "flash" and on_cpu)):
            where = " on a CPU" if on_cpu else ""
            return [
                f"model.attention={kind} has no dropout{where}; with model.dropout={dropout:g} "
                "masked products take its place in training"
            ]
        return []

    def flops_per_token(self, block_size: int) -> int:
        """Forward and backward (three times forward): every product, the head included, and all
        T x T scores, masked or not, as PaLM's appendix B counts; looking up embeddings is free.
        """
        weights = sum(parameter.numel() for parameter, _ in self.hidden_weights())
        weights += self.config.n_embd * self.vocab_size
        scores = 2 * self.config.n_layer * self.config.n_embd * block_size
        passes = 2 if self.frozen else 3  # frozen weights have no gradient
        return 2 * (passes * weights + 3 * scores)

    @property
    def frozen(self) -> bool:
        """Whether the hidden matrices are not trained, nor kept in the dtype of the others."""
        return not any(parameter.requires_grad for parameter, _ in self.hidden_weights())
