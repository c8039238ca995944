"""Trains a model's weights for rounding to 4 bits (quantization-aware training).

    quantized = QuantizedWeights(model, config.low_precision)
    with quantized.applied():          # once per optimizer step, and for an evaluation
        loss.backward()
    optimizer.step()                   # on the master weights, which are back

"Rounded" and "quantized" weights are the same: parameters that hold the values of their 4 bits. The
"masters" are the weights that the optimizer trains, kept in full precision meanwhile.

Within the block the parameters hold the values of their 4 bits, and the gradients for these values
are taken for gradients of the master weights (straight-through estimator). No model, optimizer or
compiler needs to know of it, and checkpoints hold the masters, from which `packed_tensors` packs
the same 4 bits.

Source: Bengio et al., arXiv 1308.3432 (straight-through gradients).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from config import LowPrecisionConfig
from engine.hardware.sharding import full_tensor, shard_like
from engine.precision.tensor_4bit import Tensor4bit, quantize
from model import LanguageModel


class QuantizedWeights:
    """The weights of a model that are rounded: hidden ones; by option embedding and head."""

    metric = "4bit"
    """Suffix of the metric: the held-out loss with rounded weights is eval/val_loss_4bit."""
    label = "in 4 bits"

    def __init__(self, model: LanguageModel, low_precision: LowPrecisionConfig) -> None:
        embedding, head = model.embedding_and_head()
        optional = {
            "embedding": (embedding, low_precision.quantize_embedding),
            "head": (head, low_precision.quantize_head),
        }
        chosen = {id(weight) for weight, _ in model.hidden_weights()}
        chosen |= {id(weight) for weight, wanted in optional.values() if wanted}
        self.low_precision = low_precision
        self._all = unique_tensors(model)
        self._quantized = {name: p for name, p in self._all.items() if id(p) in chosen}
        self._left_out = [name for name, (end, _) in optional.items() if id(end) not in chosen]
        self._masters: list[Tensor] = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Rounds the parameters to 4 bits, in their own memory; afterwards they are the masters
        again, bit for bit. Forward and backward both belong inside."""
        assert not self._masters, "4-bit weights are applied already"
        try:
            for parameter in self._quantized.values():
                self._masters.append(parameter.detach().clone())
                # In place, so that compiled graphs, DDP and the optimizer keep their references. It
                # raises the tensor's version: autograd refuses a backward pass outside the block.
                # A sharded weight is rounded whole: its scales are of blocks that slices would cut.
                rounded = self._pack(full_tensor(parameter)).dequantize(parameter.dtype)
                _write(parameter, shard_like(rounded, parameter))
            yield
        finally:
            # If rounding itself failed, there are fewer masters than parameters.
            for parameter, master in zip(self._quantized.values(), self._masters, strict=False):
                _write(parameter, master)
            self._masters.clear()

    def packed_tensors(self) -> dict[str, Tensor]:
        """Returns every weight by name, tied ones once. Of a 4-bit weight NAME holds the codes, and
        NAME.absmax and so on are bitsandbytes' own."""
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
        """Memory of the master weights within `applied`."""
        return sum(parameter.nbytes for parameter in self._quantized.values())

    def description(self, first_step: int | None = None) -> str:
        """Returns a line that counts what is in 4 bits; first_step: of training with them."""
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
    """Returns the state dict's own tensors, without copies; tied ones once, by the first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        first.setdefault(id(value), (name, value))
    return dict(first.values())
