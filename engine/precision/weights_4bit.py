"""A model whose weights are trained for rounding to 4 bits.

    quantized = QuantizedWeights(model, config.low_precision)
    with quantized.applied():          # once per optimizer step, and for an evaluation
        loss.backward()
    optimizer.step()                   # on the master weights, which are back

The one idea: within the block the parameters hold what their 4 bits stand for, and the gradients of
those numbers are taken for the master weights' own. Nothing else knows of it: no model, optimizer
or compiler, and checkpoints hold the masters, from which `packed_tensors` packs the same 4 bits.

Source: Bengio et al., arXiv 1308.3432 (straight-through gradients).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from config import LowPrecisionConfig
from engine.precision.tensor_4bit import Tensor4bit, quantize
from model.interface import LanguageModel


class QuantizedWeights:
    """The parameters of a model that 4 bits are for: its matrices, and by the options its ends."""

    def __init__(self, model: LanguageModel, low_precision: LowPrecisionConfig) -> None:
        ends = dict(zip(("embedding", "head"), model.embedding_and_head(), strict=True))
        asked = low_precision.quantize_embedding, low_precision.quantize_head
        chosen = {id(matrix) for matrix, _ in model.hidden_weights()}
        chosen |= {id(end) for end, wanted in zip(ends.values(), asked, strict=True) if wanted}
        self.low_precision = low_precision
        self._all = unique_tensors(model)
        self._quantized = {name: p for name, p in self._all.items() if id(p) in chosen}
        self._left_out = [name for name, end in ends.items() if id(end) not in chosen]
        self._masters: list[Tensor] = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters rounded to 4 bits, in their own memory; after it the masters, bit for bit.

        Forward and backward both belong inside: autograd refuses a backward pass after it.
        """
        assert not self._masters, "4-bit weights are applied already"
        try:
            for parameter in self._quantized.values():
                self._masters.append(parameter.detach().clone())
                _write(parameter, self._pack(parameter).dequantize(parameter.dtype))
            yield
        finally:
            # Where rounding itself failed, there are fewer masters than parameters.
            for parameter, master in zip(self._quantized.values(), self._masters, strict=False):
                _write(parameter, master)
            self._masters.clear()

    def packed_tensors(self) -> dict[str, Tensor]:
        """Every weight by its name, tied ones once; of those in 4 bits the parts: NAME holds the
        codes, NAME.absmax and so on are bitsandbytes' own."""
        assert not self._masters, "4 bits are packed from masters: rounded weights round otherwise"
        found: dict[str, Tensor] = {}
        for name, value in self._all.items():
            if name in self._quantized:
                parts = self._pack(value).tensors()
                found |= {name + part.removeprefix("weight"): t for part, t in parts.items()}
            else:
                found[name] = value.detach()
        return found

    @property
    def nbytes(self) -> int:
        """Memory of the masters during `applied`."""
        return sum(parameter.nbytes for parameter in self._quantized.values())

    def description(self, first_step: int | None = None) -> str:
        """What is in 4 bits, counted; first_step: of those trained so."""
        low = self.low_precision
        trained = [p for p in self._all.values() if isinstance(p, nn.Parameter)]
        how = [low.quantization_type, "double quantization" if low.use_double_quant else ""]
        how += [f"from step {first_step}" if first_step is not None else ""]
        counts = [sum(p.numel() for p in each) for each in (self._quantized.values(), trained)]
        return (
            f"4-bit weights: {len(self._quantized)} of {len(trained)} tensors, {counts[0]:,} of "
            f"{counts[1]:,} parameters ({', '.join(filter(None, how))})"
            + (f"; {' and '.join(self._left_out)} left out" if self._left_out else "")
        )

    def _pack(self, weight: Tensor) -> Tensor4bit:
        low = self.low_precision
        return quantize(weight, low.quantization_type, low.use_double_quant)


@torch.no_grad()
def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict's own tensors, without copies; tied ones once, under the first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        first.setdefault(id(value), (name, value))
    return dict(first.values())
