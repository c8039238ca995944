"""AdamW with moments in 4 bits: beside torch's AdamW, through interruptions, its codes alone."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import engine.optim.adamw_4bit
from config import Config, OptimizerConfig
from engine.checkpoint.contents import check_plain
from engine.optim import quantized_moments as moments
from engine.optim.adamw_4bit import AdamW4bit
from engine.optim.build import build_optimizer, load_optimizer, optimizer_lines, state_bytes
from engine.optim.quantized_moments import (
    BLOCK,
    NF4,
    POWERS,
    SUPERBLOCK,
    TORCH,
    decode_u,
    decode_v,
    encode_u,
    encode_v,
)
from model import build_model
from tests.conftest import TEXT

BETAS = (0.9, 0.99)
CPU = torch.device("cpu")
Update = Callable[[Tensor], Tensor]
"""From one gradient to AdamW's step for it; remembers the moments."""


class Toy(nn.Module):
    """Parameters in 4 bits, one of them with a partial last block, and in float32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw).to(dtype))

        self.matrix, self.stack = weights(64, 128), weights(3, 67, 41)
        self.small, self.vector = weights(16, 16), weights(5000)


def gradients(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        sparse = torch.rand(parameter.shape, generator=draw) < 0.3
        values = torch.randn(parameter.shape, generator=draw) * 0.01
        parameter.grad = (values * sparse).to(parameter.dtype)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for seed in range(first, last):
        gradients(model, seed)
        optimizer.step()


def four_bit(model: nn.Module, weight_decay: float = 0.1) -> AdamW4bit:
    optimizer = build_optimizer(model, OptimizerConfig(), weight_decay, four_bit=True)
    assert isinstance(optimizer, AdamW4bit)
    return optimizer


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


# Beside AdamW: what each optimizer does with the gradients of a BDH under AdamW.


@pytest.fixture(scope="module")
def stream() -> list[dict[str, Tensor]]:
    """The gradients of a BDH's matrices in 80 steps of AdamW."""
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "mlp_internal_dim_multiplier": 16}
    torch.manual_seed(0)
    model = build_model(
        Config.from_dict({"model": {**sizes, "dropout": 0.0}, "low_precision": {"use_4bit": False}})
    )
    words = random.Random(0).choices(TEXT.split(), k=3000)
    text = torch.tensor(list(" ".join(words).encode()))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, BETAS)
    seen = []
    for _ in range(80):
        starts = torch.randint(0, len(text) - 65, (8,)).tolist()
        rows = torch.stack([text[start : start + 65] for start in starts])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        torch.autograd.backward(loss)
        named = [(n, p) for n, p in model.named_parameters() if p.dim() >= 2 and p.numel() >= 4096]
        seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        optimizer.step()
    assert len(seen[0]) >= 4
    return seen


def updates_of(make: Callable[[nn.Parameter], torch.optim.Optimizer], shape: torch.Size) -> Update:
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = make(parameter)

    def update(gradient: Tensor) -> Tensor:
        parameter.detach().zero_()
        parameter.grad = gradient
        optimizer.step()
        return parameter.detach().clone()

    return update


def exact(shape: torch.Size) -> Update:
    return updates_of(lambda p: torch.optim.AdamW([p], 1.0, BETAS, weight_decay=0.0), shape)


def ours(shape: torch.Size) -> Update:
    return updates_of(lambda p: AdamW4bit([{"params": [p], "lr": 1.0}], BETAS, 1e-8), shape)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Numbers (n,) at the nearest of sorted levels, by the largest number of each block of 128."""
    blocks = values.view(-1, 128)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    places = torch.bucketize(blocks / scales, (levels[:-1] + levels[1:]) / 2)
    return (levels[places] * scales).view(-1)


DYNAMIC = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)
M_LEVELS = torch.tensor([*(-x for x in reversed(DYNAMIC)), 0.0, *DYNAMIC, 1.0])
V_LEVELS = {"without zero": torch.arange(1, 17) / 16, "with zero": torch.arange(16) / 15}


def linear(v_levels: Tensor, shape: torch.Size) -> Update:
    """The codes of arXiv 2309.01507: dynamic levels for m itself, linear ones for v."""
    m = v = torch.zeros(shape.numel())
    count = 0

    def update(gradient: Tensor) -> Tensor:
        nonlocal m, v, count
        count += 1
        g = gradient.reshape(-1)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        root = (v / (1 - BETAS[1] ** count)).sqrt() + 1e-8
        moved = -m / (1 - BETAS[0] ** count) / root
        m, v = nearest(m, M_LEVELS), nearest(v, v_levels)
        return moved.view(shape)

    return update


def shadow(
    stream: list[dict[str, Tensor]], make: Callable[[torch.Size], Update]
) -> tuple[float, float]:
    """Mean cosine to AdamW's steps and mean ratio of their norms, steps 51 on."""
    cosines, ratios = [], []
    for name in stream[0]:
        shape = stream[0][name].shape
        ours, theirs = make(shape), exact(shape)
        for step, found in enumerate(stream):
            one, other = ours(found[name]).flatten(), theirs(found[name]).flatten()
            if step >= 50:
                cosines.append(F.cosine_similarity(one, other, dim=0).item())
                ratios.append((one.norm() / other.norm()).item())
    return sum(cosines) / len(cosines), sum(ratios) / len(ratios)


def close(cosine: float, ratio: float) -> bool:
    return cosine >= 0.92 and 0.9 <= ratio <= 1.2


def test_its_steps_on_a_bdh_are_close_to_adamws(stream: list[dict[str, Tensor]]) -> None:
    cosine, ratio = shadow(stream, ours)
    assert close(cosine, ratio), (cosine, ratio)


@pytest.mark.parametrize("kind", V_LEVELS)
def test_linear_levels_are_not_that_close(stream: list[dict[str, Tensor]], kind: str) -> None:
    cosine, ratio = shadow(stream, lambda shape: linear(V_LEVELS[kind], shape))
    assert not close(cosine, ratio) and cosine < 0.9, (cosine, ratio)


def test_a_first_step_is_adamws() -> None:
    mine, theirs = Toy(), Toy()
    steps(mine, four_bit(mine), 0, 1)
    steps(theirs, build_optimizer(theirs, OptimizerConfig(), 0.1), 0, 1)
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_what_is_not_in_4_bits_is_adamws_bit_for_bit() -> None:
    mine, theirs = Toy(), Toy()
    steps(mine, four_bit(mine), 0, 5)
    steps(theirs, build_optimizer(theirs, OptimizerConfig(), 0.1), 0, 5)
    assert torch.equal(mine.small, theirs.small) and torch.equal(mine.vector, theirs.vector)
    assert not torch.equal(mine.matrix, theirs.matrix)


def test_only_matrices_decay() -> None:
    model = Toy()
    groups = four_bit(model).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    expected = [(model.matrix, 0.1), (model.stack, 0.1), (model.small, 0.1), (model.vector, 0.0)]
    assert [decays[id(p)] for p, _ in expected] == [decay for _, decay in expected]
    before = model.matrix.detach().clone()
    optimizer = four_bit(model)
    model.matrix.grad = torch.zeros_like(model.matrix)
    optimizer.step()
    torch.testing.assert_close(model.matrix.detach(), before * (1 - 1e-3 * 0.1))


# What it takes.


def test_a_number_takes_at_most_a_byte_and_four_hundredths() -> None:
    model = Toy()
    size, low, others = state_bytes(four_bit(model))
    assert (low, others) == (64 * 128 + 3 * 67 * 41, 16 * 16 + 5000)
    assert 1 < size / low <= 1.04
    large = nn.Linear(1024, 1024, bias=False)
    size, low, _ = state_bytes(four_bit(large))
    assert size / low < 1.017


def test_the_start_tells_what_it_takes() -> None:
    assert optimizer_lines(four_bit(Toy())) == [
        "AdamW with 4-bit moments: 1.018 bytes for each of 16,433 parameters; 5,256 in float32"
    ]
    assert optimizer_lines(build_optimizer(Toy(), OptimizerConfig(), 0.1)) == []


def test_the_state_does_not_grow_with_steps() -> None:
    model = Toy()
    optimizer = four_bit(model)
    before = state_bytes(optimizer)
    steps(model, optimizer, 0, 2)
    assert state_bytes(optimizer) == before


# Interruptions and processes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    whole, broken = Toy(dtype), Toy(dtype)
    steps(whole, four_bit(whole), 0, 8)
    first = four_bit(broken)
    steps(broken, first, 0, 4)
    check_plain(first.state_dict())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = four_bit(broken, weight_decay=0.1)
    load_optimizer(second, torch.load(file, weights_only=True))
    for saved, loaded in zip(first.state.values(), second.state.values(), strict=True):
        for name, value in saved.items():
            assert type(value) is type(loaded[name])
            if isinstance(value, Tensor):
                assert value.dtype == loaded[name].dtype and torch.equal(value, loaded[name])
    codes = [second.state[broken.matrix][name] for name in ("u_codes", "v_codes", "u_scales")]
    assert {tensor.dtype for tensor in codes} == {torch.uint8}
    steps(broken, second, 4, 8)
    assert same(whole, broken)


def test_a_loaded_state_is_a_copy() -> None:
    model, other = Toy(), Toy()
    first, second = four_bit(model), four_bit(other)
    steps(model, first, 0, 2)
    load_optimizer(second, first.state_dict())
    saved = copy.deepcopy(first.state_dict()["state"])
    steps(other, second, 2, 3)
    for index, values in first.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved[index][name]))


def test_hyperparameters_after_a_resume_are_those_of_the_config() -> None:
    model = Toy()
    optimizer = four_bit(model)
    steps(model, optimizer, 0, 1)
    resumed = four_bit(model, weight_decay=0.3)
    load_optimizer(resumed, optimizer.state_dict())
    assert {group["weight_decay"] for group in resumed.param_groups} == {0.3, 0.0}


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = Toy()
    other = build_optimizer(model, OptimizerConfig(), 0.1)
    steps(model, other, 0, 1)
    with pytest.raises(ValueError, match="saved state of parameter 0 has no "):
        four_bit(model).load_state_dict(other.state_dict())


def test_it_consumes_no_random_numbers_and_depends_on_none() -> None:
    one, other = Toy(), Toy()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps(one, four_bit(one), 0, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    steps(other, four_bit(other), 0, 3)
    assert same(one, other)


def test_rounding_differs_between_parameters_and_steps_alone() -> None:
    value = torch.full((BLOCK,), 0.5)
    value[0] = 1.0
    codes = [
        encode_v(value, key).codes for key in [(0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, SUPERBLOCK)]
    ]
    for place, one in enumerate(codes):
        assert all(not torch.equal(one, other) for other in codes[:place])
    assert torch.equal(codes[0], encode_v(value.clone(), (0, 1, 0)).codes)


def test_both_libraries_train_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    one, other = Toy(), Toy()
    steps(one, four_bit(one), 0, 4)
    codec = moments.bitsandbytes_codec(functional)
    monkeypatch.setattr(moments, "nf4", lambda device: codec)
    steps(other, four_bit(other), 0, 4)
    assert same(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_both_libraries_agree_on_cuda() -> None:
    device = torch.device("cuda")
    codec = moments.nf4(device)
    if codec.library == "torch":
        pytest.skip("without bitsandbytes there is one codec")
    numbers = torch.randn(SUPERBLOCK, device=device)
    codes, scales = codec.encode(numbers)
    expected, largest = TORCH.encode(numbers)
    assert torch.equal(codes, expected) and torch.equal(scales, largest)
    assert torch.equal(codec.decode(codes, scales), TORCH.decode(codes, scales))


# Gradients that are zero, missing, tiny or huge.


def test_zero_gradients_move_nothing() -> None:
    model = Toy()
    before = copy.deepcopy(model)
    optimizer = four_bit(model, weight_decay=0.0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert same(model, before)


def test_weights_without_gradient_stay_and_do_not_count_the_step() -> None:
    model, before = Toy(), Toy()
    optimizer = four_bit(model)
    gradients(model, 0)
    model.stack.grad = None
    optimizer.step()
    assert torch.equal(model.stack, before.stack)
    assert not any(torch.as_tensor(x).any() for x in optimizer.state[model.stack].values())
    assert not torch.equal(model.matrix, before.matrix)


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e-19, 1e-10, 1e15])
def test_gradients_of_any_size_give_bounded_steps(size: float) -> None:
    model = Toy()
    optimizer = four_bit(model, weight_decay=0.0)
    for seed in range(6):
        before = copy.deepcopy(model)
        gradients(model, seed)
        scale = size if seed != 2 else 1.0  # a usual one between
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(scale / 0.01)
        optimizer.step()
        assert (model.matrix - before.matrix).abs().max() < 10 * 1e-3
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_tensors_of_several_pieces_and_odd_ends_keep_their_moments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine.optim.adamw_4bit, "CHUNK", SUPERBLOCK)
    parameter = nn.Parameter(torch.zeros(3, 23_477))  # not a whole number of blocks or pieces
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer = AdamW4bit([{"params": [parameter]}], BETAS, 1e-8)
    optimizer.step()
    values = optimizer.state[parameter]
    u, v = (
        moments.Quantized4bit(
            *(values[f"{moment}_{name}"] for name in moments.Quantized4bit._fields)
        )
        for moment in "uv"
    )
    g = parameter.grad.view(-1)
    root = (1 - BETAS[0]) / math.sqrt(1 - BETAS[1])
    torch.testing.assert_close(decode_u(u, len(g)), root * g.sign(), rtol=1e-2, atol=0)
    square = (1 - BETAS[1]) * g * g
    seen = square > 1e-2 * square.max()
    ratio = (decode_v(v, len(g)) / square)[seen]
    assert ratio.min() > 0.6 and ratio.max() < 1.7
    assert ratio[-50:].mean() == pytest.approx(1, abs=0.2)


def test_a_small_bdh_trains_with_it() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "mlp_internal_dim_multiplier": 8}
    model = build_model(Config.from_dict({"model": sizes, "low_precision": {"use_4bit": False}}))
    optimizer = four_bit(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    rows = torch.arange(4 * 33).view(4, 33) % 7
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# The codes alone.


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
    scales = scales[scales >= moments.SMALLEST].double().log2()
    width = (scales.max() - scales.min()).item() if len(scales) else 0.0
    return float(2 ** (width / 254) * 1.0001)


@given(numbers())
@settings(max_examples=60, deadline=None)
def test_second_moments_come_back_within_a_level_and_never_as_zero(values: Tensor) -> None:
    found = decode_v(encode_v(values, (0, 1, 0)), len(values))
    largest, error = per_block(values), scale_error(values)
    lost = largest < moments.SMALLEST
    assert not found[lost].any()
    assert (found[~lost] > 0).all() and found.isfinite().all()
    floor = largest * 1e-3 * error
    seen = (values > floor) & ~lost
    ratio = (found[seen].double() / values[seen].double()).clamp(min=1e-9)
    assert (ratio < moments.RATIO * 1.0001).all() and (ratio > 1 / moments.RATIO / 1.0001).all()
    below = ~seen & ~lost
    assert (found[below] <= floor[below] * moments.RATIO * 1.0001).all()


@given(numbers(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_first_moments_come_back_within_half_the_widest_gap(values: Tensor, seed: int) -> None:
    signs = torch.randint(0, 2, values.shape, generator=torch.Generator().manual_seed(seed))
    values = values * (2 * signs - 1)
    found = decode_u(encode_u(values), len(values)).double()
    largest, error = per_block(values).double(), scale_error(values)
    gap = max(high - low for low, high in zip(NF4, NF4[1:], strict=False)) / 2
    bound = largest * (gap + error - 1) * 1.0001
    assert ((found - values).abs() <= bound.clamp(min=moments.SMALLEST)).all()
    assert not found[values == 0].any()


@given(numbers(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_both_libraries_have_one_code(values: Tensor, seed: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codec = moments.bitsandbytes_codec(functional)
    whole = F.pad(values, (0, -len(values) % BLOCK))
    signs = torch.randint(0, 2, whole.shape, generator=torch.Generator().manual_seed(seed))
    whole = whole * (2 * signs - 1)
    (codes, scales), (expected, largest) = TORCH.encode(whole), codec.encode(whole)
    assert torch.equal(codes, expected) and torch.equal(scales, largest)
    assert torch.equal(TORCH.decode(codes, scales), codec.decode(codes, scales))


def test_the_levels_are_nf4s_and_the_first_number_is_in_the_high_bits() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), torch.tensor(NF4))
    block = torch.zeros(BLOCK)
    block[0], block[1] = 1.0, -1.0
    assert TORCH.encode(block)[0][0].item() == 0xF0


def test_numbers_on_both_sides_of_each_border_take_the_nearer_level() -> None:
    levels = torch.tensor(NF4)
    borders = (levels[:-1] + levels[1:]) / 2
    block = torch.ones(BLOCK)
    block[:15], block[15:30] = borders.nextafter(levels[:-1]), borders.nextafter(levels[1:])
    found = TORCH.decode(*TORCH.encode(block))
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
    found = moments.noise(500, (3, 14, 32768), CPU)
    # Signed: the high half counts from the middle on.
    expected = [((mixed(i, *keys) >> 16) + 2**15) % 2**16 + 0.5 for i in range(500)]
    assert (found * 2**16).tolist() == expected


def test_noise_is_uniform_and_uncorrelated() -> None:
    rows = torch.stack([moments.noise(1 << 16, (2, step, 0), CPU) for step in range(8)])
    assert rows.min() > 0 and rows.max() < 1
    counts = torch.histc(rows, 64, 0, 1)
    assert ((counts - rows.numel() / 64).abs() < 6 * math.sqrt(rows.numel() / 64)).all()
    correlations = torch.corrcoef(rows) - torch.eye(8)
    assert correlations.abs().max() < 6 / math.sqrt(1 << 16)
    neighbours = torch.corrcoef(torch.stack((rows[0, 1:], rows[0, :-1])))[0, 1]
    assert abs(neighbours.item()) < 6 / math.sqrt(1 << 16)


def plain(state: dict[str, Any]) -> set[type]:
    return {type(value) for values in state["state"].values() for value in values.values()}


def test_its_state_is_tensors_and_ints() -> None:
    assert plain(four_bit(Toy()).state_dict()) == {Tensor, int}
