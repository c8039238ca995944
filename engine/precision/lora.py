"""Low-rank adapters on a frozen model whose hidden matrices are kept in 4 bits ("QLoRA").

    y = x W^T + bias + alpha / rank * (x A^T) B^T

    add_lora(model, low_precision)              # weights loaded; from here on A and B learn
    plain.load_state_dict(merge_lora(model))    # W + alpha / rank * B A, under W's name

W (out, in) is dequantized for each product and its gradient, never kept; A (rank, in) and
B (out, rank) are float32, and B begins at 0: training starts from the model as it is in 4 bits.
Fused matrices (queries, keys and values; both halves of a gated MLP) have one adapter, one A.

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
from model.interface import LanguageModel
from model.matmul import Linear

NAME = "adapter"  # of the module within the linear layer


class _Frozen(torch.autograd.Function):
    """x W^T + bias, with a gradient for x only: neither x nor W is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor4bit) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype), bias)  # in autocast's dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """torch casts it to the dtype of x."""
        return gradients[0] @ ctx.weight.dequantize(gradients[0].dtype), None, None


class Adapter(nn.Module):
    """The product of a linear layer: W as buffers, which tell its numbers bit for bit, A and B."""

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
        """What `_parts` gives, but unset."""
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
        """W. Scales are taken in float32, also where the model was cast."""
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
            shape=torch.Size([1, math.prod(self.shape)]),  # compilers find one dimension wrong
            blocksize=BLOCK,
            quant_type=self.kind,
            dtype=torch.float32,
            offset=self.offset.float() if self.nested else None,
            state2=outer,
        )
        return Tensor4bit(self.codes, inner, self.shape)

    def forward(self, x: Tensor, _weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) -> (..., out)."""
        y: Tensor = _Frozen.apply(x, bias, self.base())  # type: ignore[no-untyped-call]  # torch
        # Not add(..., alpha=): compiled for CPUs by torch 2.13, it loses alpha beside a product.
        return y + F.linear(self.factor * F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The matrix (out, in), float32, that alone computes the same product."""
        weight = self.base().dequantize()
        return weight.addmm_(self.lora_b.float(), self.lora_a.float(), alpha=self.factor)


def _parts(packed: Tensor4bit) -> dict[str, Tensor]:
    """The tensors of a flat 4-bit tensor; the 16 levels, which its kind says, left out."""
    state, outer = packed.state, packed.state.state2
    parts = {"codes": packed.codes, "scales": state.absmax}
    if outer is not None:
        parts |= {"outer_scales": outer.absmax, "outer_levels": outer.code, "offset": state.offset}
    return parts


def add_lora(model: LanguageModel, low_precision: LowPrecisionConfig, init: bool = True) -> None:
    """Freezes a model in place, hidden matrices in 4 bits, and adds what learns: A and B.

    A is drawn from torch's generator. init: whether 4-bit weights are made of the model's; else
    they are unset, for load_state_dict. Each linear layer keeps the shape of W, on the meta device,
    so that `hidden_weights()` still counts work and memory.
    Raises ConfigError where the model has other matrices, the rank is more than a side of one, or
    bitsandbytes is missing.
    """
    library()
    linears = _linears(model, low_precision.lora_rank or 0)
    model.requires_grad_(False)
    for linear in linears.values():
        adapter = Adapter(linear.weight, low_precision, init)
        shape = linear.weight.detach().to("meta")
        del linear.weight  # a parameter, in whose place no other tensor can be put
        linear.weight, linear.linear_fn = shape, adapter.forward
        linear.add_module(NAME, adapter)


def _linears(model: LanguageModel, rank: int) -> dict[str, Linear]:
    """The layers of hidden weights, by name; ConfigError where they cannot have adapters."""
    found = model.hidden_linears()
    if len(found) != len(model.hidden_weights()):
        raise ConfigError(
            f"low_precision.lora_rank={rank} adds adapters to linear layers, and the hidden "
            f"matrices of model.name={type(model).__name__.lower()} are in none. Choose another "
            "model, or set low_precision.lora_rank: null."
        )
    for name, linear in found.items():
        rows, columns = linear.weight.shape
        if rank > min(rows, columns):
            raise ConfigError(
                f"low_precision.lora_rank={rank} is more than the rank of {name}.weight, "
                f"{rows} x {columns}. Set it to {min(rows, columns)} at most; adapters are smaller "
                f"than that matrix below {math.ceil(rows * columns / (rows + columns))}."
            )
    return found


def _adapters(model: nn.Module) -> dict[str, Adapter]:
    """By the names of their linear layers."""
    return {
        name.removesuffix(f".{NAME}"): module
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    }


def merge_lora(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without adapters, float32, that computes the same."""
    adapters = _adapters(model)
    weights = {f"{name}.weight": adapter.merged() for name, adapter in adapters.items()}
    kept = model.state_dict().items()
    return {name: value for name, value in kept if f".{NAME}." not in name} | weights


def lora_description(model: nn.Module) -> str:
    """One line for the start of a run, counted and measured."""
    adapters = list(_adapters(model).values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(math.prod(adapter.shape) for adapter in adapters)
    held = sum(part.nbytes for adapter in adapters for part in adapter.buffers())
    return (
        f"Adapters of rank {adapters[0].rank} on {len(adapters)} matrices: {trained:,} trained of "
        f"{frozen:,} frozen in {adapters[0].kind} ({held / frozen:.2f} bytes each)"
    )
