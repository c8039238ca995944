"""Tensors in 4 bits, by bitsandbytes: one of 16 levels (NF4 or FP4) per number, a scale per 64.

    packed = quantize(weight, "nf4", double=True)       # 0.52 bytes per number
    weight = packed.dequantize(torch.bfloat16)

Double quantization keeps the scales in 8 bits too: float32 scales take half a bit per number, an
eighth of the codes themselves; in 8 bits, with a float32 scale per 256 of them, 0.13 bits.

Source: Dettmers et al., "QLoRA", arXiv 2305.14314.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from config import ConfigError

BLOCK = 64  # numbers with one scale
SCALES = 256  # scales with one scale of their own
INSTALL = "pip install 'bitsandbytes>=0.50,<1'"


def import_bitsandbytes(needed_by: str, alternative: str = "") -> Any:
    """Returns the library; raises ConfigError with the install command if it cannot be imported.

    needed_by: a plural that begins the message. alternative: an option that avoids it.
    """
    # On some CPUs it warns of a missing inference kernel, which nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes as library
    except Exception as error:  # a broken installation raises more than ImportError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{needed_by} need bitsandbytes, which cannot be imported here ({reason[0]}). "
            f"Install it: {INSTALL}{alternative and f', or set {alternative}'}."
        ) from None
    return library


def library() -> Any:
    """Returns bitsandbytes' functions for weights; raises ConfigError."""
    return import_bitsandbytes("4-bit weights", "low_precision.use_4bit: false").functional


def check_device(device: torch.device) -> None:
    """Raises ConfigError if weights cannot be rounded to 4 bits on this device."""
    library()
    if device.type in ("cpu", "cuda"):  # what bitsandbytes is made for
        return
    try:
        quantize(torch.ones(BLOCK, device=device), "nf4", double=True).dequantize()
    except Exception as error:  # its own and torch's, of many kinds
        raise ConfigError(
            f"4-bit weights: bitsandbytes does not run on {device} ({type(error).__name__}). Set "
            "low_precision.use_4bit: false."
        ) from None


@dataclass(frozen=True)
class Tensor4bit:
    """A tensor of any shape as codes and scales.

    codes: uint8 (n / 2, 1), two numbers per byte, the first in the high bits. state: bitsandbytes'
    QuantState of the flat tensor.
    """

    codes: Tensor
    state: Any
    shape: tuple[int, ...]

    @classmethod
    def from_tensors(cls, parts: dict[str, Tensor]) -> Tensor4bit:
        """Returns the tensor of what `tensors` gave; ValueError if parts are missing or do not
        fit."""
        codes = parts["weight"]
        stats = {name.removeprefix("weight."): p for name, p in parts.items() if name != "weight"}
        try:
            state = library().QuantState.from_dict(stats, device=codes.device)
        except (KeyError, AssertionError, TypeError) as error:
            raise ValueError(f"4-bit weight with parts {sorted(parts)}: {error!r}") from error
        shape = tuple(state.shape)
        if codes.dtype != torch.uint8 or codes.numel() != (math.prod(shape) + 1) // 2:
            raise ValueError(f"4-bit weight of shape {shape} with {codes.numel()} bytes of codes")
        state.shape = torch.Size([math.prod(shape)])
        return cls(codes, state, shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the tensor in `dtype`, or in the one it had; rounding to it comes last."""
        flat: Tensor = library().dequantize_4bit(self.codes, self.state)
        return flat.view(self.shape).to(dtype or flat.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Returns codes as "weight", and scales as plain tensors under bitsandbytes' names."""
        flat, self.state.shape = self.state.shape, torch.Size(self.shape)
        try:
            parts = self.state.as_dict(packed=True)
        finally:
            self.state.shape = flat
        return {"weight": self.codes, **{f"weight.{name}": part for name, part in parts.items()}}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and tables."""
        return sum(part.nbytes for part in self.tensors().values())


def quantize(value: Tensor, kind: str, double: bool) -> Tensor4bit:
    """Rounds a tensor to 4 bits. kind: "nf4" or "fp4". double: keeps the scales in 8 bits."""
    functional = library()
    # Flattened both here and when unpacking: given more than one row, bitsandbytes 0.50 silently
    # unpacks wrong numbers on CPUs with AVX-512, if a row is a multiple of 16 but not of the block.
    codes, state = functional.quantize_4bit(
        value.detach().reshape(-1), blocksize=BLOCK, quant_type=kind
    )
    if double:
        # Scales are all positive; without their mean they use both signs of the 8-bit levels. The
        # library's own float32 mean would depend on the number of threads, and a resumed run with
        # other threads would train on other weights.
        state.offset = state.absmax.mean(dtype=torch.float64).float()
        centred = state.absmax - state.offset
        state.absmax, state.state2 = functional.quantize_blockwise(centred, blocksize=SCALES)
        state.nested = True
    return Tensor4bit(codes, state, tuple(value.shape))
