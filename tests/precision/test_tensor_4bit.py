"""Tensors in 4 bits: what bitsandbytes packs is unpacked exactly, whatever the shape."""

from __future__ import annotations

from typing import cast

import bitsandbytes
import pytest
import torch
from torch import Tensor

from config import ConfigError
from engine.precision.tensor_4bit import BLOCK, Tensor4bit, library, quantize

# With AVX-512, bitsandbytes unpacks (1000, 32), (1000, 96), (10, 160) wrongly where not flat.
SHAPES = [(1000, 32), (1000, 96), (10, 160), (40, 34), (3, 7, 48), (7, 13), (64,), (1,)]
kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])
doubles = pytest.mark.parametrize("double", [False, True])


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def decoded(packed: Tensor4bit) -> Tensor:
    """Each number by itself: its level times its block's scale."""
    state = packed.state
    levels, scales = cast(Tensor, state.code), cast(Tensor, state.absmax)
    if state.nested:
        of_scales = state.state2.absmax.repeat_interleave(256)[: len(scales)]
        scales = state.state2.code[scales.long()] * of_scales + state.offset
    codes, count = packed.codes.view(-1), torch.Size(packed.shape).numel()
    places = torch.stack((codes >> 4, codes & 15), dim=1).view(-1).long()[:count]
    return (levels[places] * scales.repeat_interleave(BLOCK)[:count]).view(packed.shape)


@kinds
@doubles
def test_every_shape_is_unpacked_as_its_codes_and_scales_say_also_from_its_parts(
    kind: str, double: bool
) -> None:
    for shape in SHAPES:
        packed = quantize(draw(*shape), kind, double)
        exact = packed.dequantize()
        torch.testing.assert_close(exact, decoded(packed), rtol=1e-6, atol=1e-7)
        # Rounding to bfloat16 comes last.
        assert torch.equal(packed.dequantize(torch.bfloat16), exact.to(torch.bfloat16))
        parts = {name: part.clone() for name, part in packed.tensors().items()}
        again = Tensor4bit.from_tensors(parts)
        assert again.shape == shape and torch.equal(again.dequantize(), exact)
        # One row: with more, some CPUs unpack wrongly.
        for state in (packed.state, again.state):
            assert state.shape[-1] == state.shape.numel() == exact.numel()
    zeros = torch.cat((torch.zeros(BLOCK), draw(BLOCK * 9)))
    assert not quantize(zeros, kind, double).dequantize()[:BLOCK].any()


@pytest.mark.parametrize(("kind", "worst"), [("nf4", 0.1), ("fp4", 0.13)])
def test_the_error_is_that_of_sixteen_levels(kind: str, worst: float) -> None:
    weight = draw(1000, 96)
    error = (quantize(weight, kind, double=True).dequantize() - weight).norm() / weight.norm()
    assert worst / 2 < error < worst


def test_parts_have_the_names_and_the_shape_that_bitsandbytes_reads() -> None:
    packed = quantize(draw(128, 64), "nf4", double=True)
    parts = packed.tensors()
    stats = {name: part for name, part in parts.items() if name != "weight"}
    layer, x = bitsandbytes.nn.Linear4bit(64, 128, bias=False), draw(5, 64)
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        parts["weight"], stats, device="cpu"
    )
    torch.testing.assert_close(layer(x), x @ packed.dequantize().mT, rtol=1e-5, atol=1e-5)


def test_a_large_matrix_takes_half_a_byte_per_number_and_its_scales() -> None:
    for double, limit in ((True, 0.518), (False, 0.563)):
        assert quantize(torch.zeros(1024, 1024), "nf4", double).nbytes <= limit * 1024 * 1024


def test_parts_that_do_not_belong_together_are_refused() -> None:
    parts = quantize(draw(40, 34), "nf4", double=True).tensors()
    without = {name: part for name, part in parts.items() if name != "weight.absmax"}
    with pytest.raises(ValueError, match="4-bit weight with parts"):
        Tensor4bit.from_tensors(without)
    with pytest.raises(ValueError, match=r"shape \(40, 34\) with 10 bytes"):
        Tensor4bit.from_tensors(parts | {"weight": parts["weight"][:10]})


def test_a_missing_bitsandbytes_is_named_with_its_install_command(
    without_bitsandbytes: None,
) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'bitsandbytes>=0\.50,<1'"):
        library()


@pytest.mark.slow
def test_scales_do_not_depend_on_the_number_of_threads() -> None:
    weight, before, found = draw(6_000_000), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            found.append(quantize(weight, "nf4", double=True).tensors())
    finally:
        torch.set_num_threads(before)
    for parts in found[1:]:
        for name, part in parts.items():
            assert torch.equal(part, found[0][name]), name
