"""The 4-bit codes of Adam's moments: errors, levels, scales and stochastic rounding."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.optim.quantized_moments import (
    BLOCK,
    NF4,
    POWERS,
    RATIO,
    SMALLEST,
    SUPERBLOCK,
    decode_nf4,
    decode_u,
    decode_v,
    encode_nf4,
    encode_u,
    encode_v,
    noise,
)

CPU = torch.device("cpu")


@st.composite
def numbers(draw: st.DrawFn) -> Tensor:
    """Float32 numbers >= 0 of any count, over any decades down to subnormal ones, many zero."""
    count = draw(st.integers(1, 600) | st.integers(SUPERBLOCK - 3, SUPERBLOCK + 700))
    middle = draw(st.floats(-42, 30))
    decades = draw(st.floats(0, 8))
    zeros = draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    exponents = middle + decades * torch.rand(count, generator=random, dtype=torch.float64)
    kept = torch.rand(count, generator=random) >= zeros
    return (10**exponents * kept).clamp(max=1e37).float()


def per_block(values: Tensor) -> Tensor:
    """The largest of each block, once for each number."""
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    return blocks.abs().amax(1).repeat_interleave(BLOCK)[: len(values)]


def scale_error(values: Tensor) -> float:
    """The largest ratio of a scale's code to the scale, from the range of all of them."""
    scales = per_block(values)
    scales = scales[scales >= SMALLEST].double().log2()
    width = (scales.max() - scales.min()).item() if len(scales) else 0.0
    return float(2 ** (width / 254) * 1.0001)


@given(numbers())
@settings(max_examples=25, deadline=None)
def test_second_moments_come_back_within_a_level_and_never_as_zero(values: Tensor) -> None:
    found = decode_v(encode_v(values, (0, 1, 0)), len(values))
    largest, error = per_block(values), scale_error(values)
    lost = largest < SMALLEST
    assert not found[lost].any()
    assert (found[~lost] > 0).all() and found.isfinite().all()
    floor = largest * 1e-3 * error
    seen = (values > floor) & ~lost
    ratio = (found[seen].double() / values[seen].double()).clamp(min=1e-9)
    assert (ratio < RATIO * 1.0001).all() and (ratio > 1 / RATIO / 1.0001).all()
    below = ~seen & ~lost
    assert (found[below] <= floor[below] * RATIO * 1.0001).all()


@given(numbers(), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_first_moments_come_back_within_half_the_widest_gap(values: Tensor, seed: int) -> None:
    signs = torch.randint(0, 2, values.shape, generator=torch.Generator().manual_seed(seed))
    values = values * (2 * signs - 1)
    found = decode_u(encode_u(values), len(values)).double()
    largest, error = per_block(values).double(), scale_error(values)
    gap = max(high - low for low, high in zip(NF4, NF4[1:], strict=False)) / 2
    bound = largest * (gap + error - 1) * 1.0001
    assert ((found - values).abs() <= bound.clamp(min=SMALLEST)).all()
    assert not found[values == 0].any()


@given(numbers(), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_codes_of_nf4_are_those_of_bitsandbytes_bit_for_bit(values: Tensor, seed: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    whole = F.pad(values, (0, -len(values) % BLOCK))
    signs = torch.randint(0, 2, whole.shape, generator=torch.Generator().manual_seed(seed))
    whole = whole * (2 * signs - 1)
    codes, scales = encode_nf4(whole)
    expected, state = functional.quantize_4bit(whole, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(codes, expected.view(-1)) and torch.equal(scales, state.absmax)
    assert torch.equal(
        decode_nf4(codes, scales), functional.dequantize_4bit(expected, state).view(-1)
    )


def test_numbers_on_both_sides_of_each_border_take_the_nearer_level() -> None:
    levels = torch.tensor(NF4)
    borders = (levels[:-1] + levels[1:]) / 2
    block = torch.ones(BLOCK)
    block[:15], block[15:30] = borders.nextafter(levels[:-1]), borders.nextafter(levels[1:])
    found = decode_nf4(*encode_nf4(block))
    assert torch.equal(found[:15], levels[:-1]) and torch.equal(found[15:30], levels[1:])


def test_second_moments_are_right_on_average() -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = 10 ** (-2.9 * torch.rand(SUPERBLOCK // BLOCK, BLOCK, generator=draw))
    blocks[:, 0] = 1.0
    values = blocks * 10 ** (-20 * torch.rand(len(blocks), 1, generator=draw))
    total = torch.zeros_like(blocks)
    for step in range(100):
        total += (
            decode_v(encode_v(values.view(-1), (0, step, 0)), SUPERBLOCK).view(-1, BLOCK) / values
        )
    for decade in (2e-3, 1e-2, 1e-1):
        some = (blocks >= decade) & (blocks < 10 * decade)
        assert total[some].mean().item() / 100 == pytest.approx(1, abs=2e-3)
    assert total[:, 0].mean().item() / 100 == pytest.approx(1, abs=8e-3)


def test_levels_of_second_moments_cover_three_decades_without_zero() -> None:
    ratios = [high / low for low, high in zip(POWERS, POWERS[1:], strict=False)]
    assert POWERS[0] == pytest.approx(1e-3) and POWERS[-1] == 1.0
    assert max(ratios) == pytest.approx(min(ratios))


def mixed(element: int, first: int, second: int) -> int:
    """The hash of one element, by Python's integers."""
    x = (element + first) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ x >> shift) * factor % 2**32) ^ second % 2**32
    return x


def test_noise_is_a_hash_of_key_and_place_alone() -> None:
    digest = hashlib.blake2b(b"(3, 14, 32768)", digest_size=8).digest()
    keys = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
    found = noise(500, (3, 14, 32768), CPU)
    # Signed: the high half counts from the middle on.
    expected = [((mixed(i, *keys) >> 16) + 2**15) % 2**16 + 0.5 for i in range(500)]
    assert (found * 2**16).tolist() == expected


def test_noise_is_uniform_and_uncorrelated() -> None:
    rows = torch.stack([noise(1 << 16, (2, step, 0), CPU) for step in range(8)])
    assert rows.min() > 0 and rows.max() < 1
    counts = torch.histc(rows, 64, 0, 1)
    assert ((counts - rows.numel() / 64).abs() < 6 * math.sqrt(rows.numel() / 64)).all()
    correlations = torch.corrcoef(rows) - torch.eye(8)
    assert correlations.abs().max() < 6 / math.sqrt(1 << 16)
    neighbours = torch.corrcoef(torch.stack((rows[0, 1:], rows[0, :-1])))[0, 1]
    assert abs(neighbours.item()) < 6 / math.sqrt(1 << 16)


def test_rounding_differs_between_parameters_and_steps_alone() -> None:
    value = torch.full((BLOCK,), 0.5)
    value[0] = 1.0
    codes = [
        encode_v(value, key).codes for key in [(0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, SUPERBLOCK)]
    ]
    for place, one in enumerate(codes):
        assert all(not torch.equal(one, other) for other in codes[:place])
    assert torch.equal(codes[0], encode_v(value.clone(), (0, 1, 0)).codes)
