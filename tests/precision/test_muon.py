"""Muon: against torch's own, and against the paper's iteration on single matrices."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import engine.optim.muon
from engine.optim.build import set_learning_rate
from engine.optim.muon import COEFFICIENTS, Muon, batch_by_shape, orthogonalize
from tests.precision.optimizer_runs import (
    Toy,
    changed,
    gradients,
    optimizer_of,
    set_gradients,
    steps,
)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


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
def test_each_matrix_is_orthogonalized_by_the_papers_iteration(shape: tuple[int, ...]) -> None:
    matrices = draw(*shape)
    expected = torch.stack([slow(matrix) for matrix in matrices])
    found = orthogonalize(matrices, torch.float32).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    rounded = orthogonalize(matrices, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - expected).norm() < 0.05 * expected.norm()


def test_singular_values_end_near_one_and_zeros_stay_zeros() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalize(draw(4, 48, 128) * 1e-6, dtype).float())
        assert values.min() > 0.66 and values.max() < 1.22
        assert not orthogonalize(torch.zeros(2, 8, 8), dtype).any()


def test_single_matrices_move_as_torchs_muon_moves_them() -> None:
    ours, theirs = Toy(), Toy()
    optimizer = optimizer_of("muon", ours)
    options = {"weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([theirs.small], lr=1e-3, **options)  # type: ignore[arg-type]
    before = ours.small.detach().clone()
    steps(ours, optimizer, range(5))
    steps(theirs, reference, range(5))
    moved = (theirs.small - before).norm()
    # bfloat16 has 8 bits, and torch rounds the norm too.
    assert moved > 0 and (ours.small - theirs.small).norm() < 0.05 * moved


def test_stacked_matrices_move_as_separate_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.optim.muon, "supports_fast_bfloat16", lambda device: False)
    model = Toy()
    optimizer = optimizer_of("muon", model)
    names = {id(p): name for name, p in model.named_parameters()}
    expected = {}
    for parameter, count in model.hidden_weights():
        value, momentum = parameter.detach().double(), torch.zeros(())
        for seed in range(3):
            lr, gradient = 0.01 / (1 + seed), gradients(model, seed)[names[id(parameter)]].double()
            momentum = 0.95 * momentum + 0.05 * gradient
            ahead = 0.95 * momentum + 0.05 * gradient
            parts = ahead.reshape(-1, ahead.shape[-1]).chunk(count)
            update = torch.cat([0.2 * math.sqrt(max(part.shape)) * slow(part) for part in parts])
            value = value * (1 - lr * 0.1) - lr * update.reshape(value.shape)
        expected[parameter] = value
    for seed in range(3):
        set_learning_rate(optimizer, 0.01 / (1 + seed))
        steps(model, optimizer, range(seed, seed + 1))
    for parameter, value in expected.items():
        torch.testing.assert_close(parameter.double(), value, rtol=0, atol=1e-5)


def test_matrices_of_one_shape_are_updated_together_on_cuda_and_alone_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine.optim.muon, "CUDA_BATCH", 7 * 24)
    shapes = [(4, 6), (6, 4), *[(4, 6)] * 9, (50, 50), (50, 50)]
    parameters = [nn.Parameter(draw(*shape)) for shape in shapes]
    together = batch_by_shape(parameters, torch.device("cuda"))
    assert [len(batch) for batch in together] == [7, 3, 1, 1, 1]
    assert all(len({p.shape for p in batch}) == 1 for batch in together)
    assert [len(batch) for batch in batch_by_shape(parameters, torch.device("cpu"))] == [1] * 13
    assert {id(p) for batch in together for p in batch} == {id(p) for p in parameters}


def test_matrices_updated_together_move_as_they_do_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.optim.muon, "supports_fast_bfloat16", lambda device: False)

    def moved() -> list[Tensor]:
        weights = [nn.Parameter(draw(12, 8) * scale) for scale in (1, 2, 3)]
        optimizer = Muon([{"params": weights, "matrices": 2, "lr": 0.1}], (0.9, 0.99), 1e-8)
        for step in range(2):
            for number, weight in enumerate(weights):
                weight.grad = draw(12, 8).roll(number + step)
            optimizer.step()
        return [weight.detach() for weight in weights]

    alone = moved()
    device = torch.device("cuda")
    together = functools.partial(engine.optim.muon.batch_by_shape, device=device)
    monkeypatch.setattr(engine.optim.muon, "batch_by_shape", lambda found, _: together(found))
    for one, other in zip(moved(), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_step_has_the_size_of_adamws() -> None:
    model, before = Toy(), Toy()
    steps(model, optimizer_of("muon", model, weight_decay=0.0), range(1))
    moved = (model.matrix - before.matrix).square().mean().sqrt().item()
    assert moved == pytest.approx(0.2 * 1e-3, rel=0.2)


def test_the_loss_scaler_unscales_for_it_and_skips_overflows() -> None:
    scaled, plain = Toy(), Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, reference = optimizer_of("muon", scaled), optimizer_of("muon", plain)
    for seed, factor in ((0, 1.0), (1, math.inf), (2, 1.0)):
        set_gradients(scaled, seed)
        scale = scaler.scale(torch.ones(())).item()
        for parameter in scaled.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(scale * factor)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(factor):
            steps(plain, reference, range(seed, seed + 1))
    assert not changed(scaled, plain)


def test_the_products_in_bfloat16_repeat_bit_for_bit() -> None:
    matrices = draw(3, 40, 130)
    first = orthogonalize(matrices, torch.bfloat16)
    shifted = torch.empty(matrices.numel() + 1)[1:].view_as(matrices).copy_(matrices)
    for _ in range(20):
        assert torch.equal(orthogonalize(shifted.clone(), torch.bfloat16), first)
