"""Token-by-token generation: temperature, top-k, top-p; pure functions of logits and generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.interface import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class Decoder:
    """Feeds tokens to a model with a cache that grows."""

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.cache: Any = None

    def prefill(self, tokens: Tensor) -> Tensor:
        """Begins anew with tokens (B, T >= 1); returns the logits after the last one, (B, V)."""
        self.cache = self.model.init_cache(self.batch_size)
        return self.model.prefill_or_decode(tokens, self.cache)

    def decode(self, tokens: Tensor) -> Tensor:
        """Appends tokens (B, 1); returns the logits after them, (B, V)."""
        return self.model.prefill_or_decode(tokens, self.cache)


class RecordedDecoder(Decoder):
    """Feeds tokens to a model by a recorded step, with a cache of fixed size and address."""

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        max_length: int,
        device: torch.device,
        record: Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]],
    ) -> None:
        """max_length: the most tokens of a sample. record: returns a function that repeats the work
        of the one it is given, e.g. `engine.hardware.cuda_graph.record_graph`."""
        super().__init__(model, batch_size)
        self.max_length, self.length = max_length, 0
        self.cache = model.init_cache(batch_size, max_length)
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self._position = torch.zeros((), dtype=torch.long, device=device)
        model.prefill_or_decode(self._tokens, self.cache)  # allocates the cache
        self._replay = record(self._step, device)

    def _step(self) -> Tensor:
        return self.model.decode_at(self._tokens, self.cache, self._position)

    def prefill(self, tokens: Tensor) -> Tensor:
        self.model.clear_cache(self.cache)
        self.length = tokens.shape[1]
        return self.model.prefill_or_decode(tokens, self.cache)

    def decode(self, tokens: Tensor) -> Tensor:
        """Appends tokens (B, 1); returns the logits after them, (B, V), which the next call
        overwrites."""
        assert self.length < self.max_length, "the cache is full"
        self._tokens.copy_(tokens)
        self._position.fill_(self.length)
        self.length += 1
        return self._replay()


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator | None] = (None,),
    context: int | None = None,
    decoder: Decoder | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each sample, (B,), endlessly, after a prompt (1, T >= 1).

    There is one sample for each generator, and it does not depend on the others. context: the most
    tokens the model sees; None: all, or `model.max_context`. decoder: one made for this model and
    number of samples; None: a new `Decoder`.
    """
    if model.max_context is not None:
        context = min(context or model.max_context, model.max_context)
    seen = prompt.expand(len(generators), -1)
    seen = seen if context is None else seen[:, -context:]
    decoder = decoder or Decoder(model, len(generators))
    logits = decoder.prefill(seen)  # (B, V)
    while True:
        rows = zip(logits.float(), generators, strict=True)
        tokens = torch.cat([draw(row[None], sampling, generator) for row, generator in rows])
        yield tokens
        if context is not None:
            seen = torch.cat((seen, tokens[:, None]), dim=1)
            if seen.shape[1] > context:
                # A cache cannot drop its first tokens, on which keys and values of all later ones
                # depend. It is filled anew with the last half: one prefill per half a context.
                seen = seen[:, -max(1, context // 2) :]
                logits = decoder.prefill(seen)
                continue
        logits = decoder.decode(tokens[:, None])


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
