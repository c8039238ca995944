"""Token-by-token generation: temperature, top-k, top-p; pure functions of logits and generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.interface import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator | None] = (None,),
    context: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each sample, (B,), endlessly, after a prompt (1, T >= 1).

    There is one sample for each generator, and it does not depend on the others. context: the most
    tokens the model sees; None: all, or `model.max_context`.
    """
    if model.max_context is not None:
        context = min(context or model.max_context, model.max_context)
    seen = prompt.expand(len(generators), -1)
    seen = seen if context is None else seen[:, -context:]
    cache = model.init_cache(len(generators))
    logits = model.prefill_or_decode(seen, cache)  # (B, V)
    while True:
        rows = zip(logits.float(), generators, strict=True)
        tokens = torch.cat([draw(row[None], sampling, generator) for row, generator in rows])
        yield tokens
        following = tokens[:, None]
        if context is not None:
            seen = torch.cat((seen, following), dim=1)
            if seen.shape[1] > context:
                # A cache cannot drop its first tokens, on which keys and values of all later ones
                # depend. It is filled anew with the last half: one prefill per half a context.
                seen = following = seen[:, -max(1, context // 2) :]
                cache = model.init_cache(len(generators))
        logits = model.prefill_or_decode(following, cache)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Returns token ids (B,) drawn from logits (B, V)."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        probabilities = _nucleus(probabilities, sampling.top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zeroes all but the most likely tokens that together reach top_p, at least one."""
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    kept[:, 0] = ordered[:, 0]
    return torch.zeros_like(probabilities).scatter(-1, ids, kept)
