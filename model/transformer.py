"""What GPT and Llama have in common: tokens -> embedding -> blocks -> norm and head -> logits.

Between the blocks tokens are rows of one matrix (R = B * T, D), as matrix products take them. A
pass is training on whole sequences or, with caches, generation that goes on where the last ended.

B samples, T tokens, R = B * T, D = n_embd, V vocabulary; H heads, K of them of keys and values
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import ModelConfig
from model.attention import KVCache, Sight, capacity, drop, is_plain_on_cpu, look, look_back
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


class Kept(NamedTuple):
    """What a layer keeps of each token for its backward pass, beside what all models keep."""

    rotated: int  # numbers: queries and keys after a rotation
    hidden: int  # numbers: within the MLP
    hidden_gradients: int  # numbers: their gradients, at a time
    statistics: int  # bytes: of each norm


class Stage(NamedTuple):
    """Memory of one part of a training step, in bytes."""

    saved: int  # kept from forward until its backward pass
    gradients: int  # of its weights, from its backward pass on
    found: int  # the same as its backward pass finds them: casts are copies
    working: int  # on top, at some moment of its backward pass


def peak_bytes(stages: Sequence[Stage]) -> int:
    """The most that stages, in the order of the forward pass, hold at a moment of the backward
    pass, less all gradients."""
    held, peak, total = sum(stage.saved for stage in stages), 0, 0
    for stage in reversed(stages):
        peak = max(peak, held + stage.working + stage.found)
        held += stage.gradients - stage.saved
        peak = max(peak, held + (stage.found if stage.found < stage.gradients else 0))
        total += stage.gradients
    return max(0, peak - total)


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

    @abstractmethod
    def kept(self) -> Kept:
        """What a layer keeps of each token."""

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

    def activation_bytes(
        self, tokens: tuple[int, int], dtype: torch.dtype, on_cpu: bool, adding: bool = False
    ) -> int:
        """Peak memory of a training step on tokens (B, T), weights and their gradients aside.

        dtype: of the matrix products; weights that are cast to it for a step count. adding: to the
        gradients of micro-steps before, which are there from the start.
        """
        size = dtype.itemsize
        layer = [
            self._attention_stage(tokens, size, on_cpu),
            self._mlp_stage(math.prod(tokens), size),
        ]
        ends = self._head_stages(math.prod(tokens), size)
        embedding = self._embedding_stage(tokens, size, on_cpu)
        stages = [embedding, *layer * self.config.n_layer, *ends]
        if self.frozen:  # no weight has a gradient
            stages = [stage._replace(gradients=0, found=0) for stage in stages]
        if adding:  # each is added at once, and gone
            stages = [stage._replace(gradients=0, found=max(stage[1:3])) for stage in stages]
        return peak_bytes(stages)

    def _part(self, rows: int, size: int, weights: int) -> Stage:
        """What attention and MLP have in common: the stream and its gradient, norm, dropout."""
        D = self.config.n_embd
        cast = size * weights if size < 4 and not self.frozen else 0
        made = (4 + size % 4) * weights // 2 if self.frozen else 0  # one matrix, for its products
        dropped = size * rows * D if self.config.dropout else 0
        saved = rows * (4 * D + self.kept().statistics + size * D) + dropped + cast
        return Stage(saved, 4 * weights, size * weights, rows * D * (4 + size) + dropped + made)

    def _attention_stage(self, tokens: tuple[int, int], size: int, on_cpu: bool) -> Stage:
        (B, T), D = tokens, self.config.n_embd
        keys = self.kv_heads * self.width
        part = self._part(B * T, size, 2 * D * (D + keys))
        heads, rotated = B * T * (D + 2 * keys) * size, B * T * self.kept().rotated * size
        saved, working = part.saved + heads + B * T * D * size, part.working + heads
        if self._plain(T, size, on_cpu):
            scores = B * self.config.n_head * T * T * size
            kept = 3 if self.config.dropout else 1
            return Stage(saved + kept * scores, part.gradients, part.found, working + scores)
        statistics = 4 * B * T * self.config.n_head
        return Stage(saved + rotated + statistics, part.gradients, part.found, working)

    def _plain(self, T: int, size: int, on_cpu: bool) -> bool:
        """Whether training holds all scores."""
        kind, dropout = self.config.attention, self.config.dropout
        return kind == "math" or (on_cpu and is_plain_on_cpu(kind, T, size, dropout))

    def _mlp_weights(self) -> int:
        D = self.config.n_embd
        layer = (
            sum(parameter.numel() for parameter, _ in self.hidden_weights()) // self.config.n_layer
        )
        return layer - 2 * D * (D + self.kv_heads * self.width)

    def _mlp_stage(self, rows: int, size: int) -> Stage:
        kept = self.kept()
        part = self._part(rows, size, self._mlp_weights())
        saved = part.saved + rows * kept.hidden * size
        return Stage(
            saved, part.gradients, part.found, part.working + rows * kept.hidden_gradients * size
        )

    def _head_stages(self, rows: int, size: int) -> list[Stage]:
        """The norm and the logits, then the loss, which is computed in float32."""
        D, V = self.config.n_embd, self.vocab_size
        cast = size * V * D if size < 4 else 0
        saved = rows * (4 * D + self.kept().statistics + size * D) + cast
        head = Stage(saved, 4 * V * D, size * V * D, rows * (V + D) * size)
        return [head, Stage(4 * rows * V, 0, 0, 8 * rows * V)]

    def _embedding_stage(self, tokens: tuple[int, int], size: int, on_cpu: bool) -> Stage:
        """And the mask, which all layers share."""
        (B, T), D = tokens, self.config.n_embd
        masks = B if self.config.mask == "causal_document" else int(self._plain(T, size, on_cpu))
        stream, table, positions = 4 * B * T * D, self.vocab_size * D, D * (self.max_context or 0)
        saved = masks * T * T * size + (stream if self.config.dropout else 0)
        if self.tied:  # the head's gradient waits for this one; transposed, it needs a third
            working, table = 2 * stream + 4 * table * (2 if size == 4 else 1), 0
        else:
            working = 2 * stream
        gradients = 4 * (positions + table)
        return Stage(saved, gradients, gradients, working)
