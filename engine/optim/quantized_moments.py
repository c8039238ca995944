"""Adam's two moments in 4 bits each: one of 16 levels for each number, and a scale for each 128.

The one idea: what is kept of the first moment m is u = m / sqrt(v), which is as large for rarely
used parameters as for others, so that rounding costs the same share of every step. It takes the
levels of NF4. The second moment v has 16 levels in equal ratios over three decades: none is zero,
because steps are divided by its root, and chance decides between neighbours so that it is right on
average, or the little that a step adds where beta2 is near 1 would be lost.

Scales are in 8 bits: 255 powers between the smallest and the largest of 256 blocks.

Sources: Li et al., "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507, for blocks of
128 and a second moment without zero; Dettmers et al., "QLoRA", arXiv 2305.14314, for NF4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # numbers with one scale
GROUP = 256  # scales with one range
SUPERBLOCK = BLOCK * GROUP  # numbers with one range
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
CELLS = 64  # of [-1, 1]: so many that none has two borders between levels of NF4
DECADES = 3
POWERS = tuple(10 ** (DECADES * (level / 15 - 1)) for level in range(16))
RATIO = POWERS[1] / POWERS[0]
SMALLEST = torch.finfo(torch.float32).tiny  # the first number that is not subnormal, 2 ** -126
MIX = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))  # shifts and factors of C. Wellons' "lowbias32"


@dataclass(frozen=True)
class Codec:
    """NF4 of whole blocks. Codes and numbers are the same by each library."""

    library: str
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Numbers, float32 (n,), to codes, uint8 (n / 2,), and scales (n / 128,), the largest ones."""
    decode: Callable[[Tensor, Tensor], Tensor]
    """Codes and scales to numbers."""


def nf4(device: torch.device) -> Codec:
    """bitsandbytes' kernels on CUDA, where they can be had; on a CPU torch is five times faster."""
    return _bitsandbytes() or TORCH if device.type == "cuda" else TORCH


@cache
def _bitsandbytes() -> Codec | None:
    try:
        import bitsandbytes.functional as functional
    except Exception:  # besides ImportError, what a broken library raises
        return None
    return bitsandbytes_codec(functional)


def bitsandbytes_codec(functional: ModuleType) -> Codec:
    """The codec of `bitsandbytes.functional`. Numbers stay flat: on some CPUs it unpacks rows to
    wrong ones.
    """

    def encode(numbers: Tensor) -> tuple[Tensor, Tensor]:
        codes, state = functional.quantize_4bit(numbers, blocksize=BLOCK, quant_type="nf4")
        return codes.view(-1), state.absmax

    def decode(codes: Tensor, scales: Tensor) -> Tensor:
        state = functional.QuantState(
            scales, torch.Size([2 * codes.numel()]), blocksize=BLOCK, quant_type="nf4"
        )
        state.dtype = torch.float32
        numbers: Tensor = functional.dequantize_4bit(codes.view(-1, 1), state)
        return numbers.view(-1)

    return Codec("bitsandbytes", encode, decode)


def _encode(numbers: Tensor) -> tuple[Tensor, Tensor]:
    blocks = numbers.view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    inverse = 1.0 / scales.clamp(min=1e-38)  # bitsandbytes multiplies, which rounds otherwise
    scaled = (blocks * inverse.unsqueeze(1)).clamp_(-1, 1).view(-1)
    cells = _cells(scaled)
    level, border = _look_up(_borders(numbers.device), cells).view(-1, 2).unbind(1)
    return _pack(level.add_(scaled > border)), scales


def _decode(codes: Tensor, scales: Tensor) -> Tensor:
    return (unpack(codes, NF4).view(-1, BLOCK) * scales.unsqueeze(1)).view(-1)


TORCH = Codec("torch", _encode, _decode)


def _cells(scaled: Tensor) -> Tensor:
    return scaled.add(1).mul_(CELLS // 2).int()


@cache
def _borders(device: torch.device) -> Tensor:
    """For each cell the level at its low end and the border to the next level, if it has one."""
    levels = torch.tensor(NF4)
    borders = (levels[:-1] + levels[1:]) / 2
    table = torch.full((CELLS + 1, 2), 2.0)
    table[:, 0] = torch.bucketize(torch.arange(CELLS + 1), _cells(borders))
    table[_cells(borders).long(), 1] = borders
    return table.to(device)


@cache
def _pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    bytes_ = range(256)
    return torch.tensor([(values[b >> 4], values[b & 15]) for b in bytes_], device=device)


def _look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Rows (n,) of pairs, as (2 n,); pairs moved as single float64 take a fifth of the time."""
    return table.view(torch.float64).view(-1).index_select(0, rows).view(torch.float32)


def unpack(codes: Tensor, values: tuple[float, ...]) -> Tensor:
    """The two of 16 values that each byte (n,) stands for: (2 n,), that of the high bits first."""
    return _look_up(_pairs(values, codes.device), codes.int())


def _pack(levels: Tensor) -> Tensor:
    """Two levels to a byte, the first in the high bits."""
    codes = levels.to(torch.uint8)
    return codes[::2].mul(16).add_(codes[1::2])


class Quantized4bit(NamedTuple):
    """Numbers in 4 bits: `codes`, uint8, two in each; a code of the scale of each BLOCK in
    `scales`, uint8; and a row in `ranges`, float32, for each SUPERBLOCK. The last of
    each may be partial.
    """

    codes: Tensor
    scales: Tensor
    ranges: Tensor

    def part(self, start: int, stop: int) -> Quantized4bit:
        """The numbers from `start`, a multiple of SUPERBLOCK, to `stop`: the same memory."""
        sizes = zip(self, (2, BLOCK, SUPERBLOCK), strict=True)
        return Quantized4bit(*(own[start // size : -(-stop // size)] for own, size in sizes))

    def write(self, numbers: Quantized4bit) -> None:
        """Takes over codes of whole blocks, as many as there is room for."""
        for own, new in zip(self, numbers, strict=True):
            own.copy_(new[: len(own)])


def zeros(count: int, device: torch.device) -> Quantized4bit:
    """As many zeros: 0.508 bytes for each."""
    codes, scales, ranges = (-(-count // size) for size in (2, BLOCK, SUPERBLOCK))
    return Quantized4bit(
        torch.zeros(codes, dtype=torch.uint8, device=device),
        torch.zeros(scales, dtype=torch.uint8, device=device),
        torch.zeros(ranges, 2, device=device),
    )


def encode_u(numbers: Tensor) -> Quantized4bit:
    """Numbers, float32 (n,), to the nearest levels of NF4."""
    codes, scales = nf4(numbers.device).encode(_whole(numbers, BLOCK))
    return Quantized4bit(codes, *encode_scales(scales, torch.round))


def decode_u(u: Quantized4bit, count: int) -> Tensor:
    """The first `count` numbers."""
    scales = decode_scales(u.scales, u.ranges)
    return nf4(u.codes.device).decode(_whole(u.codes, BLOCK // 2), scales)[:count]


def encode_v(numbers: Tensor, key: tuple[int, ...]) -> Quantized4bit:
    """Numbers >= 0, float32 (n,), to the level above or below, as `noise` of the key decides.

    Numbers below 1/1000 of their block's scale become that.
    """
    blocks = _whole(numbers, BLOCK).view(-1, BLOCK)
    scales, ranges = encode_scales(blocks.amax(1), torch.ceil)  # up: no number is above its scale
    divisor = decode_scales(scales, ranges).clamp(min=SMALLEST).unsqueeze(1)
    place = (blocks / divisor).log10_().mul_(15 / DECADES).add_(15).clamp_(0, 15)
    level = place.floor()
    ratio = place.sub_(level).mul_(math.log2(RATIO)).exp2_()  # to the level, 1 to RATIO
    levels = ratio.sub_(1).div_(RATIO - 1).add_(level).view(-1)
    chance = noise(blocks.numel(), key, blocks.device)
    return Quantized4bit(_pack(levels.add_(chance)), scales, ranges)


def decode_v(v: Quantized4bit, count: int) -> Tensor:
    """The first `count` numbers."""
    blocks = unpack(_whole(v.codes, BLOCK // 2), POWERS).view(-1, BLOCK)
    return (blocks * decode_scales(v.scales, v.ranges).unsqueeze(1)).view(-1)[:count]


def _whole(numbers: Tensor, size: int) -> Tensor:
    """The numbers, and zeros up to a multiple of `size`."""
    short = -len(numbers) % size
    return F.pad(numbers, (0, short)) if short else numbers  # F.pad always copies


def encode_scales(scales: Tensor, rounding: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Scales >= 0 (k,) to codes, uint8 (k,), and float32 ranges (k / 256, 2): the logarithm to
    base 2 of code 1, and what each further code adds. Code 0 is zero, and everything subnormal.
    """
    rows = F.pad(scales, (0, -scales.numel() % GROUP)).view(-1, GROUP)
    zero = rows < SMALLEST
    logarithms = rows.clamp(min=SMALLEST).log2()
    high = logarithms.amax(1, keepdim=True)
    low = logarithms.where(~zero, high).amin(1, keepdim=True)
    step = ((high - low) / 254).clamp(min=2**-20)  # above 0, where all scales are the same
    codes = rounding((logarithms - low) / step).clamp_(0, 254).add_(1).masked_fill_(zero, 0)
    return codes.to(torch.uint8).view(-1)[: scales.numel()], torch.cat((low, step), 1)


def decode_scales(codes: Tensor, ranges: Tensor) -> Tensor:
    """What `encode_scales` gave, to scales."""
    rows = F.pad(codes, (0, -codes.numel() % GROUP)).view(-1, GROUP)
    scales = (rows.float().sub_(1) * ranges[:, 1:]).add_(ranges[:, :1]).exp2_()
    return scales.masked_fill_(rows == 0, 0).view(-1)[: codes.numel()]


def noise(count: int, key: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers (count,) between 0 and 1 that follow from the key alone: 65,536 different ones.

    No generator is asked, so that a resumed run and every process have the same.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    first, second = (int.from_bytes(part, "big", signed=True) for part in (digest[:4], digest[4:]))
    x = torch.arange(count, dtype=torch.int32, device=device).add_(first)
    for shift, factor in MIX:
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(factor)
        x.bitwise_xor_(second)  # or keys would have one sequence, from different places on
    return (x >> 16).float().add_(2**15 + 0.5).mul_(2**-16)
