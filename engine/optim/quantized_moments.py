"""Adam's two moments in 4 bits each: one of 16 levels per number, one scale per block of 128.

Instead of the first moment m, u = m / sqrt(v) is stored. It is about as large for rarely used
parameters as for others, so that rounding costs each of them the same share of its step. It takes
the levels of NF4. The second moment v takes 16 levels in equal ratios over three decades, none of
them zero, because steps are divided by its root. It is rounded stochastically: beta2 is near 1, so
one step changes v by less than half a level, and rounding to the nearest would never move it.

Scales are stored in 8 bits: the logarithms of 256 of them (a superblock) share one range.

Sources: Li et al., "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507, for blocks of
128 and a second moment without zero; Dettmers et al., "QLoRA", arXiv 2305.14314, for NF4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # numbers that share a scale
GROUP = 256  # scales that share a range
SUPERBLOCK = BLOCK * GROUP  # numbers that share a range: 32,768
NOISE_SPAN = 16 * SUPERBLOCK  # numbers whose noise has one key: 524,288
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
CELLS = 64  # equal parts of [-1, 1]; few enough to look up, each has at most one border of NF4
DECADES = 3
POWERS = tuple(10 ** (DECADES * (level / 15 - 1)) for level in range(16))
RATIO = POWERS[1] / POWERS[0]
SMALLEST = torch.finfo(torch.float32).tiny  # the smallest number that is not subnormal, 2 ** -126
MIX = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))  # shifts and factors of C. Wellons' "lowbias32"


class Quantized4bit(NamedTuple):
    """Numbers in 4 bits, 0.508 bytes each.

    codes: uint8, two numbers per byte. scales: uint8, one per BLOCK. ranges: float32, one row of
    two per SUPERBLOCK. The last block and the last superblock may be partial.
    """

    codes: Tensor
    scales: Tensor
    ranges: Tensor

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> Quantized4bit:
        """Returns `count` zeros."""
        codes, scales, ranges = (-(-count // size) for size in (2, BLOCK, SUPERBLOCK))
        return cls(
            torch.zeros(codes, dtype=torch.uint8, device=device),
            torch.zeros(scales, dtype=torch.uint8, device=device),
            torch.zeros(ranges, 2, device=device),
        )

    def part(self, start: int, stop: int) -> Quantized4bit:
        """Returns a view of the numbers from `start`, a multiple of SUPERBLOCK, to `stop`."""
        sizes = zip(self, (2, BLOCK, SUPERBLOCK), strict=True)
        return Quantized4bit(*(own[start // size : -(-stop // size)] for own, size in sizes))

    def write(self, numbers: Quantized4bit) -> None:
        """Copies the codes of whole blocks, without the padding of the last one."""
        for own, new in zip(self, numbers, strict=True):
            own.copy_(new[: len(own)])


def encode_u(numbers: Tensor) -> Quantized4bit:
    """Rounds float32 numbers (n,) to the nearest levels of NF4."""
    codes, scales = encode_nf4(_padded(numbers, BLOCK))
    return Quantized4bit(codes, *encode_scales(scales, torch.round))


def decode_u(u: Quantized4bit, count: int) -> Tensor:
    """Returns the first `count` numbers, float32."""
    scales = decode_scales(u.scales, u.ranges)
    return decode_nf4(_padded(u.codes, BLOCK // 2), scales)[:count]


def encode_nf4(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes, uint8 (n / 2,), and scales (n / 128,) of float32 numbers (n,), n a multiple of
    128. They equal those of bitsandbytes bit for bit."""
    blocks = numbers.view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    # A division would round differently from bitsandbytes, which multiplies by the inverse.
    inverse = 1.0 / scales.clamp(min=1e-38)
    scaled = (blocks * inverse.unsqueeze(1)).clamp_(-1, 1).view(-1)
    # A lookup by cell and one comparison take the place of a search among 16 levels.
    level, border = _look_up(_level_and_border(numbers.device), _cell(scaled)).view(-1, 2).unbind(1)
    return _pack(level.add_(scaled > border)), scales


def decode_nf4(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns the numbers (n,) of codes (n / 2,) and scales (n / 128,)."""
    return (_unpack(codes, NF4).view(-1, BLOCK) * scales.unsqueeze(1)).view(-1)


def encode_v(numbers: Tensor, key: tuple[int, ...]) -> Quantized4bit:
    """Rounds float32 numbers >= 0 (n,) to the level above or below, by `noise(key)`, so that they
    are right on average. Numbers below 1/1000 of their block's scale become 1/1000 of it."""
    blocks = _padded(numbers, BLOCK).view(-1, BLOCK)
    # Scales are rounded up: a number above its block's scale would have no level above it.
    scales, ranges = encode_scales(blocks.amax(1), torch.ceil)
    divisor = decode_scales(scales, ranges).clamp(min=SMALLEST).unsqueeze(1)
    place = (blocks / divisor).log10_().mul_(15 / DECADES).add_(15).clamp_(0, 15)
    level = place.floor()
    # The chance of the level above is linear in the number, not in its logarithm. Otherwise the
    # mean would lie above the number, and v would grow with every step.
    ratio = place.sub_(level).mul_(math.log2(RATIO)).exp2_()  # to the level below, 1 to RATIO
    levels = ratio.sub_(1).div_(RATIO - 1).add_(level).view(-1)
    chance = noise(blocks.numel(), key, blocks.device)
    return Quantized4bit(_pack(levels.add_(chance)), scales, ranges)


def decode_v(v: Quantized4bit, count: int) -> Tensor:
    """Returns the first `count` numbers, float32."""
    blocks = _unpack(_padded(v.codes, BLOCK // 2), POWERS).view(-1, BLOCK)
    return (blocks * decode_scales(v.scales, v.ranges).unsqueeze(1)).view(-1)[:count]


def encode_scales(scales: Tensor, rounding: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Returns codes, uint8 (k,), of scales >= 0 (k,), and float32 ranges (k / 256, 2).

    A range is the base-2 logarithm of code 1 and the step from code to code. Code 0 is zero, which
    subnormal scales become too.
    """
    rows = F.pad(scales, (0, -scales.numel() % GROUP)).view(-1, GROUP)
    zero = rows < SMALLEST
    logarithms = rows.clamp(min=SMALLEST).log2()
    high = logarithms.amax(1, keepdim=True)
    low = logarithms.where(~zero, high).amin(1, keepdim=True)
    step = ((high - low) / 254).clamp(min=2**-20)  # above 0 also where all scales are equal
    codes = rounding((logarithms - low) / step).clamp_(0, 254).add_(1).masked_fill_(zero, 0)
    return codes.to(torch.uint8).view(-1)[: scales.numel()], torch.cat((low, step), 1)


def decode_scales(codes: Tensor, ranges: Tensor) -> Tensor:
    """Returns the scales (k,) of codes (k,) and ranges (k / 256, 2)."""
    rows = F.pad(codes, (0, -codes.numel() % GROUP)).view(-1, GROUP)
    scales = (rows.float().sub_(1) * ranges[:, 1:]).add_(ranges[:, :1]).exp2_()
    return scales.masked_fill_(rows == 0, 0).view(-1)[: codes.numel()]


def noise(count: int, key: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns numbers (count,) between 0 and 1, of 65,536 different values, hashed from the key and
    the position alone.

    The key's last number is the position of the first one in its tensor, where a span of NOISE_SPAN
    begins. Each span has its own key, so that a call over several spans equals a call for each.

    A random generator would have a state to save, and processes that hold the same weights would
    round them differently.
    """
    starts = range(key[-1], key[-1] + count, NOISE_SPAN)
    keys = torch.tensor([_hashed((*key[:-1], start)) for start in starts], dtype=torch.int32)
    if device.type == "cuda":  # through pinned memory: the CPU need not wait for the GPU
        keys = keys.pin_memory().to(device, non_blocking=True)
    first, second = keys.unsqueeze(2).to(device).unbind(1)  # (spans, 1) each
    numel = len(starts) * min(count, NOISE_SPAN)
    x = torch.arange(numel, dtype=torch.int32, device=device).view(len(starts), -1)
    x.add_(first - x[:, :1])  # positions in each span, shifted
    for shift, factor in MIX:
        # torch's >> is arithmetic: the mask clears the copies of the sign bit.
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(factor)
        # Without `second` all keys would read one and the same sequence from different positions.
        x.bitwise_xor_(second)
    return (x >> 16).float().add_(2**15 + 0.5).mul_(2**-16).view(-1)[:count]


def _hashed(key: tuple[int, ...]) -> tuple[int, int]:
    """Returns two signed 32-bit integers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    first, second = (int.from_bytes(part, "big", signed=True) for part in (digest[:4], digest[4:]))
    return first, second


def _padded(numbers: Tensor, size: int) -> Tensor:
    """Returns the numbers with zeros up to a multiple of `size`."""
    short = -len(numbers) % size
    return F.pad(numbers, (0, short)) if short else numbers  # F.pad always copies


def _cell(scaled: Tensor) -> Tensor:
    return scaled.add(1).mul_(CELLS // 2).int()


@cache
def _level_and_border(device: torch.device) -> Tensor:
    """Returns (CELLS + 1, 2): the level at the low end of each cell, and the border to the next
    level; 2, which no number exceeds, for a cell without border."""
    levels = torch.tensor(NF4)
    borders = (levels[:-1] + levels[1:]) / 2
    table = torch.full((CELLS + 1, 2), 2.0)
    table[:, 0] = torch.bucketize(torch.arange(CELLS + 1), _cell(borders))
    table[_cell(borders).long(), 1] = borders
    return table.to(device)


@cache
def _pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns (256, 2): the two values of each byte, that of the high bits first."""
    pairs = [(values[byte >> 4], values[byte & 15]) for byte in range(256)]
    return torch.tensor(pairs, device=device)


def _look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Returns rows (n,) of a float32 table (k, 2) as (2 n,)."""
    # Moving each pair as one float64 takes a fifth of the time of indexing rows of two.
    return table.view(torch.float64).view(-1).index_select(0, rows).view(torch.float32)


def _unpack(codes: Tensor, values: tuple[float, ...]) -> Tensor:
    """Returns the values (2 n,) of bytes (n,)."""
    return _look_up(_pairs(values, codes.device), codes.int())


def _pack(levels: Tensor) -> Tensor:
    """Returns bytes (n / 2,) of levels (n,), the first of two in the high bits as in bitsandbytes;
    fractions are cut off."""
    codes = levels.to(torch.uint8)
    return codes[::2].mul(16).add_(codes[1::2])
