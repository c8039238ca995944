"""Muon: against torch's own, against matrices one by one, and as the optimizer of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine.optim.muon
from config import BDHConfig, OptimizerConfig
from engine.checkpoint.contents import check_plain
from engine.optim.build import build_optimizer, load_optimizer, set_learning_rate
from engine.optim.muon import COEFFICIENTS, orthogonalize
from model.bdh.model import BDH

MUON = OptimizerConfig(name="muon")


class Toy(nn.Module):
    """One parameter of each kind; the loss is any function with gradients everywhere."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw))

        self.embed = weights(11, 8)
        self.fused = weights(24, 8)  # three of (8, 8)
        self.heads = weights(4, 8, 32)  # four of (8, 32)
        self.rows = weights(64, 8)  # two of (32, 8)
        self.single = weights(8, 40)
        self.gain = weights(8)

    def matrices(self) -> list[tuple[nn.Parameter, int]]:
        return [(self.fused, 3), (self.heads, 4), (self.rows, 2), (self.single, 1)]


def gradients(model: nn.Module, seed: int) -> dict[nn.Parameter, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {p: torch.randn(p.shape, generator=draw) * 0.01 for p in model.parameters()}


def rate(seed: int) -> float:
    return 0.01 / (1 + seed)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for parameter, gradient in gradients(model, seed).items():
        parameter.grad = gradient
    set_learning_rate(optimizer, rate(seed))
    optimizer.step()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products in float32, as on devices without fast bfloat16."""
    monkeypatch.setattr(engine.optim.muon, "supports_fast_bfloat16", lambda device: False)
    yield


def slow(matrix: Tensor) -> Tensor:
    """The iteration as its paper writes it, in float64."""
    x: Tensor = matrix.double() / matrix.double().norm()
    if x.shape[0] > x.shape[1]:
        return slow(matrix.T).T
    a, b, c = COEFFICIENTS
    for _ in range(5):
        x = a * x + (b * (x @ x.T) + c * (x @ x.T) @ (x @ x.T)) @ x
    return x


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 16, 48), (4, 48, 16), (2, 1, 9)])
def test_orthogonalized_is_the_papers_iteration_on_each_matrix(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([slow(matrix) for matrix in matrices])
    torch.testing.assert_close(
        orthogonalize(matrices, torch.float32).double(), expected, rtol=0, atol=1e-5
    )
    rounded = orthogonalize(matrices, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_end_near_one(dtype: torch.dtype) -> None:
    matrices = torch.randn(4, 48, 128, generator=torch.Generator().manual_seed(0)) * 1e-6
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype).float())
    assert values.min() > 0.66 and values.max() < 1.22


def test_a_matrix_without_gradient_stays_where_it_is() -> None:
    assert not orthogonalize(torch.zeros(2, 8, 8), torch.bfloat16).any()


def test_single_matrices_move_as_torchs_muon_moves_them() -> None:
    ours, theirs = Toy(), Toy()
    optimizer = build_optimizer(ours, MUON, 0.1)
    reference = torch.optim.Muon(
        [theirs.single], weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    before = ours.single.detach().clone()
    for seed in range(5):
        step(ours, optimizer, seed)
        step(theirs, reference, seed)
    moved = (theirs.single - before).norm()
    assert moved > 0
    # bfloat16 has 8 bits, and torch rounds the norm too
    assert (ours.single - theirs.single).norm() < 0.05 * moved


def test_everything_else_moves_as_under_adamw_bit_for_bit() -> None:
    ours, theirs = Toy(), Toy()
    optimizer = build_optimizer(ours, MUON, 0.1)
    reference = build_optimizer(theirs, OptimizerConfig(), 0.1)
    for seed in range(4):
        step(ours, optimizer, seed)
        step(theirs, reference, seed)
    assert torch.equal(ours.embed, theirs.embed)
    assert torch.equal(ours.gain, theirs.gain)
    assert not torch.equal(ours.single, theirs.single)


def test_stacked_matrices_move_as_matrices_apart(exact: None) -> None:
    model = Toy()
    optimizer = build_optimizer(model, MUON, 0.1)
    expected = {}
    for parameter, count in model.matrices():
        value, momentum = parameter.detach().double(), torch.zeros(())
        for seed in range(3):
            gradient = gradients(model, seed)[parameter].double()
            momentum = 0.95 * momentum + 0.05 * gradient
            ahead = 0.95 * momentum + 0.05 * gradient
            parts = ahead.reshape(-1, ahead.shape[-1]).chunk(count)
            update = torch.cat([0.2 * math.sqrt(max(part.shape)) * slow(part) for part in parts])
            value = value * (1 - rate(seed) * 0.1) - rate(seed) * update.reshape(value.shape)
        expected[parameter] = value
    for seed in range(3):
        step(model, optimizer, seed)
    for parameter, value in expected.items():
        torch.testing.assert_close(parameter.double(), value, rtol=0, atol=1e-5)


def test_a_step_has_the_size_of_adamws() -> None:
    model = Toy()
    before = model.heads.detach().clone()
    step(model, build_optimizer(model, MUON, 0.0), 0)
    assert (model.heads - before).square().mean().sqrt().item() == pytest.approx(0.002, rel=0.2)


def test_only_vectors_do_not_decay() -> None:
    model = Toy()
    groups = build_optimizer(model, MUON, 0.1).param_groups
    without = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    assert [p is model.gain for p in without] == [True]
    assert sum(len(group["params"]) for group in groups) == 6


def test_frozen_weights_and_weights_without_gradient_stay() -> None:
    model = Toy()
    model.heads.requires_grad_(False)
    optimizer = build_optimizer(model, MUON, 0.1)
    before = copy.deepcopy(model)
    model.single.grad = torch.ones_like(model.single)
    optimizer.step()
    changed = [
        n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))
    ]
    assert changed == ["single"]


def test_its_state_is_plain_in_float32_and_resumes_exactly() -> None:
    whole, broken = Toy(), Toy()
    optimizer = build_optimizer(whole, MUON, 0.1)
    for seed in range(6):
        step(whole, optimizer, seed)
    first = build_optimizer(broken, MUON, 0.1)
    for seed in range(3):
        step(broken, first, seed)
    state = copy.deepcopy(first.state_dict())
    check_plain(state)
    saved = [tensor for values in state["state"].values() for tensor in values.values()]
    assert {tensor.dtype for tensor in saved} == {torch.float32}
    second = build_optimizer(broken, MUON, 0.1)
    load_optimizer(second, state)
    for seed in range(3, 6):
        step(broken, second, seed)
    for ours, theirs in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_hyperparameters_after_a_resume_are_those_of_the_config() -> None:
    model = Toy()
    optimizer = build_optimizer(model, MUON, 0.1)
    step(model, optimizer, 0)
    resumed = build_optimizer(model, MUON, 0.3)
    load_optimizer(resumed, optimizer.state_dict())
    assert {group["weight_decay"] for group in resumed.param_groups} == {0.3, 0.0}


def test_the_loss_scaler_unscales_for_it_and_skips_overflows() -> None:
    scaled, plain = Toy(), Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, reference = build_optimizer(scaled, MUON, 0.1), build_optimizer(plain, MUON, 0.1)
    for seed, factor in ((0, 1.0), (1, math.inf), (2, 1.0)):
        scale = scaler.scale(torch.ones(())).item()
        for ours, gradient in gradients(scaled, seed).items():
            ours.grad = gradient * scale * factor
        for theirs, gradient in gradients(plain, seed).items():
            theirs.grad = gradient
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(factor):
            reference.step()
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_products_in_bfloat16_repeat_bit_for_bit() -> None:
    matrices = torch.randn(3, 40, 130, generator=torch.Generator().manual_seed(0))
    first = orthogonalize(matrices, torch.bfloat16)
    shifted = torch.empty(matrices.numel() + 1)[1:].view_as(matrices).copy_(matrices)
    for _ in range(20):
        assert torch.equal(orthogonalize(shifted.clone(), torch.bfloat16), first)


def test_a_small_bdh_trains_with_it() -> None:
    torch.manual_seed(0)
    model = BDH(BDHConfig(2, 16, 0.0, 2, 8, 32))
    optimizer = build_optimizer(model, MUON, 0.1)
    set_learning_rate(optimizer, 1e-2)
    rows = torch.arange(4 * 33).view(4, 33) % 7
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
