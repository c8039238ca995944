"""Small transformers for the tests, their definition written slowly, and what holds for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, ModelConfig
from model import build_model
from model.transformer import Transformer

VOCABULARY = 256
BLOCK = 24
Slow = Callable[[Transformer, Tensor, Tensor | None], Tensor]
"""model, tokens (B, T), documents (B, T) or None -> logits (B, T, V), by the definition."""


def config(name: str, **options: Any) -> Config:
    """A run of a model of 2 layers, 4 heads of 8, without dropout."""
    values: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 4, "dropout": 0.0}
    model = ModelConfig(name=cast(Any, name), vocab_size=VOCABULARY, **{**values, **options})
    return replace(Config(), model=model, training=replace(Config().training, block_size=BLOCK))


def small(name: str, **options: Any) -> Transformer:
    """Its model, with weights larger than at the start, so that nothing is near zero."""
    model = cast(Transformer, build_model(config(name, **options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def some_documents(batch: int, length: int) -> Tensor:
    """Numbers (B, T) of documents of a few tokens."""
    return (torch.rand(batch, length) < 0.2).cumsum(1).int()


def slow_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """q (T, H, d), k and v (T, K, d) -> (T, H * d), one head and one token at a time."""
    T, H, d = q.shape
    shared = H // k.shape[1]
    rows = []
    for t in range(T):
        seen = [u for u in range(t + 1) if documents is None or documents[u] == documents[t]]
        for h in range(H):
            keys, values = k[seen, h // shared], v[seen, h // shared]
            scores = torch.stack([q[t, h] @ key for key in keys]) / d**0.5
            weights = scores.exp() / scores.exp().sum()
            rows.append(
                sum((w * value for w, value in zip(weights, values, strict=True)), 0 * q[0, 0])
            )
    return torch.stack(rows).view(T, H * d)


def step(model: nn.Module, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The gradients of the loss by name; none are left behind."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def check_parity(model: Transformer, slow: Slow, documents: Tensor | None) -> None:
    """Logits and all gradients equal those of the definition, in float64."""
    model.double()
    tokens = torch.randint(VOCABULARY, (2, 11))
    logits, expected = model(tokens, documents), slow(model, tokens, documents)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    found, wanted = step(model, logits, tokens), step(model, expected, tokens)
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-7, atol=1e-10, msg=name)


def fed(model: Transformer, tokens: Tensor, pieces: list[int]) -> Tensor:
    """Logits after the last of some pieces of tokens (B, T)."""
    state = model.init_cache(len(tokens))
    for piece in torch.split(tokens[:, : sum(pieces)], pieces, dim=1):
        logits = model.prefill_or_decode(piece, state)
    assert not logits.requires_grad
    return logits
