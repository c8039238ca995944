"""Tensors in 4 bits: what bitsandbytes packs is unpacked exactly, whatever the shape."""

from __future__ import annotations

import sys
from typing import cast

import bitsandbytes
import pytest
import torch
from torch import Tensor

from config import ConfigError
from engine.precision.tensor_4bit import BLOCK, Tensor4bit, from_tensors, library, quantize

KINDS = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]
# With AVX-512, bitsandbytes unpacks (1000, 32), (1000, 96), (10, 160) wrongly where not flat.
SHAPES = [(1000, 32), (1000, 96), (10, 160), (40, 34), (3, 7, 48), (7, 13), (64,), (1,)]


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


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_unpacked_as_its_codes_and_scales_say(
    shape: tuple[int, ...], kind: str, double: bool
) -> None:
    packed = quantize(draw(*shape), kind, double)
    torch.testing.assert_close(packed.dequantize(), decoded(packed), rtol=1e-6, atol=1e-7)


def test_bitsandbytes_sees_one_row_since_with_more_some_cpus_unpack_wrongly() -> None:
    packed = quantize(draw(1000, 32), "nf4", double=True)
    for state in (packed.state, from_tensors(packed.tensors()).state):
        assert state.shape[-1] == state.shape.numel() == 32_000


@pytest.mark.parametrize(("kind", "worst"), [("nf4", 0.1), ("fp4", 0.13)])
def test_the_error_is_that_of_sixteen_levels(kind: str, worst: float) -> None:
    weight = draw(1000, 96)
    error = (quantize(weight, kind, double=True).dequantize() - weight).norm() / weight.norm()
    assert worst / 2 < error < worst


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_parts_become_the_same_tensor_again(kind: str, double: bool) -> None:
    packed = quantize(draw(40, 34), kind, double)
    again = from_tensors({name: part.clone() for name, part in packed.tensors().items()})
    assert again.shape == (40, 34)
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_parts_have_the_names_and_the_shape_that_bitsandbytes_reads() -> None:
    weight = draw(128, 64)
    parts = quantize(weight, "nf4", double=True).tensors()
    stats = {name: part for name, part in parts.items() if name != "weight"}
    theirs = bitsandbytes.nn.Params4bit.from_prequantized(parts["weight"], stats, device="cpu")
    layer = bitsandbytes.nn.Linear4bit(64, 128, bias=False)
    layer.weight = theirs
    x = draw(5, 64)
    expected = x @ quantize(weight, "nf4", double=True).dequantize().mT
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_rounding_to_bfloat16_comes_last(kind: str, double: bool) -> None:
    weight = draw(30, 96)
    exact = quantize(weight, kind, double).dequantize()
    assert torch.equal(
        quantize(weight, kind, double).dequantize(torch.bfloat16), exact.to(torch.bfloat16)
    )


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_blocks_of_zeros_stay_zeros_without_double_quantization(kind: str, double: bool) -> None:
    weight = torch.cat((torch.zeros(BLOCK), draw(BLOCK * 9)))
    assert not quantize(weight, kind, double).dequantize()[:BLOCK].any()


@pytest.mark.parametrize(("double", "limit"), [(True, 0.518), (False, 0.563)])
def test_a_large_matrix_takes_half_a_byte_per_number_and_its_scales(
    double: bool, limit: float
) -> None:
    packed = quantize(torch.zeros(1024, 1024), "nf4", double)
    assert packed.nbytes <= limit * 1024 * 1024


def test_parts_that_do_not_belong_together_are_refused() -> None:
    parts = quantize(draw(40, 34), "nf4", double=True).tensors()
    without = {name: part for name, part in parts.items() if name != "weight.absmax"}
    with pytest.raises(ValueError, match="4-bit weight with parts"):
        from_tensors(without)
    with pytest.raises(ValueError, match=r"shape \(40, 34\) with 10 bytes"):
        from_tensors(parts | {"weight": parts["weight"][:10]})


def test_a_missing_bitsandbytes_is_named_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'bitsandbytes>=0\.50,<1'"):
        library()


def test_scales_do_not_depend_on_the_number_of_threads() -> None:
    weight = torch.randn(6_000_000, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            found.append(quantize(weight, "nf4", double=True).tensors())
    finally:
        torch.set_num_threads(before)
    for parts in found[1:]:
        for name, part in parts.items():
            assert torch.equal(part, found[0][name]), name
