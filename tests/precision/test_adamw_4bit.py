"""AdamW with moments in 4 bits beside torch's AdamW, on gradients of a BDH and of any size."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine.optim.adamw_4bit
from config import Config
from engine.optim.adamw_4bit import AdamW4bit
from engine.optim.quantized_moments import (
    NOISE_SPAN,
    SUPERBLOCK,
    Quantized4bit,
    decode_u,
    decode_v,
)
from model import build_model
from tests.conftest import TEXT
from tests.precision.optimizer_runs import Toy, changed, optimizer_of, set_gradients, steps
from tests.runs import assert_equal

BETAS = (0.9, 0.99)


def bdh_gradients() -> list[dict[str, Tensor]]:
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


def updates(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> list[Tensor]:
    """What each step adds to a parameter of zeros."""
    (parameter,), found = optimizer.param_groups[0]["params"], []
    for gradient in gradients:
        parameter.detach().zero_()
        parameter.grad = gradient
        optimizer.step()
        found.append(parameter.detach().flatten().clone())
    return found


@pytest.mark.slow
def test_its_steps_on_a_bdh_are_close_to_adamws() -> None:
    stream = bdh_gradients()
    cosines, ratios = [], []
    for name, first in stream[0].items():
        one, other = (nn.Parameter(torch.zeros(first.shape)) for _ in range(2))
        gradients = [found[name] for found in stream]
        ours = updates(AdamW4bit([{"params": [one], "lr": 1.0}], BETAS, 1e-8), gradients)
        adamw = torch.optim.AdamW([other], 1.0, BETAS, weight_decay=0.0)
        for mine, theirs in list(zip(ours, updates(adamw, gradients), strict=True))[50:]:
            cosines.append(F.cosine_similarity(mine, theirs, dim=0).item())
            ratios.append((mine.norm() / theirs.norm()).item())
    assert sum(cosines) / len(cosines) >= 0.92  # linear levels of m and v reach 0.9 at most
    assert 0.9 <= sum(ratios) / len(ratios) <= 1.2


def test_a_first_step_is_adamws() -> None:
    mine, theirs = Toy(), Toy()
    steps(mine, optimizer_of("adamw_4bit", mine), range(1))
    steps(theirs, optimizer_of("adamw", theirs), range(1))
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_its_state_is_codes_and_ints_and_the_state_of_another_optimizer_is_refused() -> None:
    model = Toy()
    optimizer, other = optimizer_of("adamw_4bit", model), optimizer_of("adamw", model)
    state = optimizer.state[model.matrix]
    assert {name: type(value) for name, value in state.items()} == {
        "step": int,
        **{f"{moment}_{part}": Tensor for moment in "uv" for part in Quantized4bit._fields},
    }
    assert (
        state["u_codes"].dtype == state["v_codes"].dtype == state["u_scales"].dtype == torch.uint8
    )
    steps(model, other, range(1))
    with pytest.raises(ValueError, match="saved state of parameter 0 has no "):
        optimizer.load_state_dict(other.state_dict())


def test_it_consumes_no_random_numbers_and_depends_on_none() -> None:
    one, other = Toy(), Toy()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps(one, optimizer_of("adamw_4bit", one), range(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    steps(other, optimizer_of("adamw_4bit", other), range(3))
    assert not changed(one, other)


def test_zero_gradients_move_nothing_and_missing_ones_do_not_count_the_step() -> None:
    model, before = Toy(), Toy()
    optimizer = optimizer_of("adamw_4bit", model, weight_decay=0.0)
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = None if name == "stack" else torch.zeros_like(parameter)
        optimizer.step()
    assert not changed(model, before)
    assert optimizer.state[model.matrix]["step"] == 3
    assert not any(torch.as_tensor(x).any() for x in optimizer.state[model.stack].values())


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e-19, 1e-10, 1e15])
def test_gradients_of_any_size_give_bounded_steps(size: float) -> None:
    model = Toy()
    optimizer = optimizer_of("adamw_4bit", model, weight_decay=0.0)
    for seed in range(6):
        before = copy.deepcopy(model)
        set_gradients(model, seed)
        scale = size if seed != 2 else 1.0  # a usual one between
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(scale / 0.01)
        optimizer.step()
        assert (model.matrix - before.matrix).abs().max() < 10 * 1e-3
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_step_does_not_depend_on_the_chunks_it_is_computed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for spans in (1, 32):
        monkeypatch.setattr(engine.optim.adamw_4bit, "CHUNK", spans * NOISE_SPAN)
        draw = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(600, 1001, generator=draw))  # 1.1 spans
        parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer = AdamW4bit([{"params": [parameter]}], BETAS, 1e-8)
        for _ in range(2):
            optimizer.step()
        found.append((parameter.detach(), optimizer.state[parameter]))
    assert_equal(found[0], found[1], "chunks")


def test_tensors_of_several_chunks_with_an_odd_end_keep_their_moments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine.optim.adamw_4bit, "CHUNK", SUPERBLOCK)
    parameter = nn.Parameter(torch.zeros(3, 23_477))  # not a whole number of blocks or chunks
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer = AdamW4bit([{"params": [parameter]}], BETAS, 1e-8)
    optimizer.step()
    values = optimizer.state[parameter]
    u, v = (
        Quantized4bit(*(values[f"{moment}_{name}"] for name in Quantized4bit._fields))
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
