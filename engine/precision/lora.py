"""Low-rank adapters (LoRA) on a frozen model whose hidden weights are kept in 4 bits (QLoRA).

    y = x W^T + bias + alpha / rank * (x A^T) B^T

    apply_lora(model, low_precision)               # after loading weights; A and B are trained
    plain.load_state_dict(merge_lora(model))       # W + alpha / rank * B A, under W's name

W (out, in) is dequantized for each product and its gradient, never kept; A (rank, in) and
B (out, rank) are float32, and B starts at 0: training starts from the model as it is in 4 bits.
Fused weights (queries, keys and values; both halves of a gated MLP) have one adapter with one A.

Sources: Hu et al., arXiv 2106.09685 (LoRA); Dettmers et al., arXiv 2305.14314 (QLoRA).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError, LowPrecisionConfig
from engine.precision.tensor_4bit import BLOCK, SCALES, Tensor4bit, library, quantize
from model import LanguageModel
from model.matmul import Linear


class LoraLinear(Linear):
    """A linear layer with a frozen weight in 4 bits and an adapter; takes a `Linear`'s place.

    `weight` is the shape of W, on the meta device: counts of parameters, FLOPs and memory read it.
    """

    def __init__(self, linear: Linear, low_precision: LowPrecisionConfig, init: bool) -> None:
        nn.Module.__init__(self)  # Linear's own would allocate W
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.n_fused = linear.n_fused
        self.weight = linear.weight.detach().to("meta")
        self.register_parameter("bias", linear.bias)
        self.adapter = Adapter(linear.weight, low_precision, init)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y: Tensor = self.adapter(x, self.bias)
        return y


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias, with a gradient for x alone.

    autograd's own linear function would keep the dequantized W of every layer until the backward
    pass: the memory that 4 bits save. Dequantizing it again costs less than the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor4bit) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype), bias)  # in autocast's dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.weight.dequantize(gradients[0].dtype), None, None


class Adapter(nn.Module):
    """W in 4 bits as buffers, which hold its values bit for bit, and A and B as parameters."""

    codes: Tensor
    scales: Tensor
    outer_scales: Tensor
    outer_levels: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, low_precision: LowPrecisionConfig, init: bool) -> None:
        super().__init__()
        rank, (rows, columns) = low_precision.lora_rank, weight.shape
        assert rank is not None
        self.shape, self.rank = (rows, columns), rank
        self.kind, self.nested = low_precision.quantization_type, low_precision.use_double_quant
        self.factor = low_precision.lora_alpha / rank
        parts = _parts(quantize(weight, self.kind, self.nested)) if init else self._empty(weight)
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.lora_a = nn.Parameter(weight.new_empty(rank, columns))
        self.lora_b = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # +-1 / sqrt(in), as LoRA's authors

    def _empty(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the tensors of `_parts`, uninitialized."""
        blocks = -(-weight.numel() // BLOCK)
        codes = weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        if not self.nested:
            return {"codes": codes, "scales": weight.new_empty(blocks)}
        return {
            "codes": codes,
            "scales": codes.new_empty(blocks),
            "outer_scales": weight.new_empty(-(-blocks // SCALES)),
            "outer_levels": weight.new_empty(256),
            "offset": weight.new_empty(()),
        }

    def base(self) -> Tensor4bit:
        """Returns W. Its scales are float32, also if the model was cast."""
        state, outer = library().QuantState, None
        if self.nested:
            outer = state(
                absmax=self.outer_scales.float(),
                code=self.outer_levels.float(),
                blocksize=SCALES,
                dtype=torch.float32,
            )
        inner = state(
            absmax=self.scales if self.nested else self.scales.float(),
            shape=torch.Size([1, math.prod(self.shape)]),  # torch.compile fails with one dimension
            blocksize=BLOCK,
            quant_type=self.kind,
            dtype=torch.float32,
            offset=self.offset.float() if self.nested else None,
            state2=outer,
        )
        return Tensor4bit(self.codes, inner, self.shape)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) -> (..., out)."""
        y: Tensor = _FrozenLinear.apply(x, bias, self.base())  # type: ignore[no-untyped-call]  # torch
        # torch 2.13 compiles add(..., alpha=) for CPUs wrongly: alpha is lost beside a product.
        return y + F.linear(self.factor * F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Returns W + alpha / rank * B A, (out, in), float32."""
        weight = self.base().dequantize()
        return weight.addmm_(self.lora_b.float(), self.lora_a.float(), alpha=self.factor)


def _parts(packed: Tensor4bit) -> dict[str, Tensor]:
    """Returns the tensors of a flat 4-bit tensor, but for the 16 levels, which `kind` implies."""
    state, outer = packed.state, packed.state.state2
    parts = {"codes": packed.codes, "scales": state.absmax}
    if outer is not None:
        parts |= {"outer_scales": outer.absmax, "outer_levels": outer.code, "offset": state.offset}
    return parts


def apply_lora(model: LanguageModel, low_precision: LowPrecisionConfig, init: bool = True) -> bool:
    """Freezes a model and swaps its hidden linear layers for `LoraLinear`, if `lora_rank` is set;
    returns whether it is.

    A is drawn from torch's generator. init: quantizes the model's weights; else 4-bit weights are
    uninitialized, for `load_state_dict`. Raises ConfigError for hidden weights that are not in
    linear layers, for a rank above a side of one of them, or if bitsandbytes is missing.
    """
    rank = low_precision.lora_rank
    if rank is None:
        return False
    library()
    linears = model.hidden_linears()
    _check_rank(model, linears, rank)
    model.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(linear, low_precision, init))
    return True


def _check_rank(model: LanguageModel, linears: dict[str, Linear], rank: int) -> None:
    if len(linears) != len(model.hidden_weights()):
        raise ConfigError(
            f"low_precision.lora_rank={rank} adds adapters to linear layers, and the hidden "
            f"weights of model.name={type(model).__name__.lower()} are not in linear layers. "
            "Choose another model, or set low_precision.lora_rank: null."
        )
    for name, linear in linears.items():
        rows, columns = linear.weight.shape
        if rank > min(rows, columns):
            raise ConfigError(
                f"low_precision.lora_rank={rank} is more than the rank of {name}.weight, "
                f"{rows} x {columns}. Set it to {min(rows, columns)} at most; adapters are smaller "
                f"than that matrix below {math.ceil(rows * columns / (rows + columns))}."
            )


def _lora_linears(model: nn.Module) -> dict[str, LoraLinear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def merge_lora(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict, float32, of a model without adapters that computes the same."""
    linears = _lora_linears(model)
    merged = {f"{name}.weight": linear.adapter.merged() for name, linear in linears.items()}
    own = tuple(f"{name}.adapter." for name in linears)
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(own)}
    return kept | merged


def lora_description(model: nn.Module) -> str:
    """Returns a line that counts what is trained and what is frozen."""
    adapters = [linear.adapter for linear in _lora_linears(model).values()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(math.prod(adapter.shape) for adapter in adapters)
    held = sum(part.nbytes for adapter in adapters for part in adapter.buffers())
    return (
        f"Adapters of rank {adapters[0].rank} on {len(adapters)} matrices: {trained:,} trained of "
        f"{frozen:,} frozen in {adapters[0].kind} ({held / frozen:.2f} bytes each)"
    )
