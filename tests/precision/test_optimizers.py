"""What all optimizers have in common: AdamW in 32, 8 and 4 bits, and Muon."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config, ConfigError
from engine.checkpoint.contents import check_plain
from engine.optim.build import load_optimizer, low_bit_state_size, optimizer_lines
from model import build_model
from tests.precision.optimizer_runs import (
    OPTIMIZERS,
    Toy,
    changed,
    optimizer_of,
    set_gradients,
    steps,
)

pytest.importorskip("bitsandbytes")
each = pytest.mark.parametrize("name", OPTIMIZERS)
NOT_ADAMWS = {  # the parameters that each moves otherwise than torch's AdamW, by more than rounding
    "adamw_4bit": {"matrix", "stack"},
    "adamw_8bit": {"matrix", "stack", "vector"},
    "muon": {"matrix", "stack", "fused", "small"},
}


@pytest.mark.parametrize("name", NOT_ADAMWS)
def test_the_other_parameters_move_as_under_adamw(name: str) -> None:
    mine, theirs = Toy(), Toy()
    steps(mine, optimizer_of(name, mine), range(5))
    steps(theirs, optimizer_of("adamw", theirs), range(5))
    others = {n for n, _ in mine.named_parameters()} - NOT_ADAMWS[name]
    if name == "adamw_8bit":  # by a kernel of its own
        for other in others:
            torch.testing.assert_close(mine.get_parameter(other), theirs.get_parameter(other))
        moved = (theirs.matrix - Toy().matrix).norm()
        assert 0 < (mine.matrix - theirs.matrix).norm() < 0.25 * moved
    else:
        assert changed(mine, theirs) == NOT_ADAMWS[name]


@each
def test_only_matrices_decay_and_frozen_weights_or_those_without_gradient_stay(name: str) -> None:
    model = Toy()
    model.fused.requires_grad_(False)
    optimizer = optimizer_of(name, model)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    trained = {n: p for n, p in model.named_parameters() if n != "fused"}
    assert decays == {id(p): 0.0 if n == "vector" else 0.1 for n, p in trained.items()}
    before = copy.deepcopy(model)
    set_gradients(model, 0)
    model.fused.grad = model.stack.grad = model.vector.grad = None
    optimizer.step()
    assert changed(model, before) == {"matrix", "small", "embedding"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each
def test_it_resumes_bit_for_bit_with_the_hyperparameters_of_the_config(
    name: str, dtype: torch.dtype
) -> None:
    whole, stopped = Toy(dtype), Toy(dtype)
    steps(whole, optimizer_of(name, whole), range(6))
    first = optimizer_of(name, stopped)
    steps(stopped, first, range(3))
    check_plain(first.state_dict())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for group in saved["param_groups"]:
        group["weight_decay"] = 7.0
    second = optimizer_of(name, stopped)
    load_optimizer(second, saved)
    for before, after in zip(first.state.values(), second.state.values(), strict=True):
        for key, value in before.items():
            assert type(value) is type(after[key])
            if isinstance(value, Tensor):
                assert value.dtype == after[key].dtype and torch.equal(value, after[key])
    steps(stopped, second, range(3, 6))
    assert not changed(whole, stopped)


def test_the_size_of_moments_in_few_bits_is_told_from_the_start_and_does_not_grow() -> None:
    matrices, vector, small = 64 * 128 + 3 * 67 * 41, 5000, 24 * 8 + 8 * 40 + 11 * 8
    for name, covered, others, line in (
        ("adamw_4bit", matrices, small + vector, "4-bit moments: 1.018 bytes for each of 16,433"),
        ("adamw_8bit", matrices + vector, small, "8-bit moments: 2.127 bytes for each of 21,433"),
    ):
        model = Toy()
        optimizer = optimizer_of(name, model)
        size = low_bit_state_size(optimizer)
        assert size[1:] == (covered, others)
        assert optimizer_lines(optimizer) == [
            f"AdamW with {line} parameters; {others:,} in float32"
        ]
        steps(model, optimizer, range(2))
        assert low_bit_state_size(optimizer) == size
    large = torch.nn.Linear(1024, 1024, bias=False)
    assert low_bit_state_size(optimizer_of("adamw_4bit", large)).low_bit_bytes < 1.017 * 1024**2
    assert optimizer_lines(optimizer_of("adamw", Toy())) == []


def test_without_its_library_adamw_8bit_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError) as caught:
        optimizer_of("adamw_8bit", Toy())
    message = str(caught.value)
    assert message.startswith("8-bit moments need bitsandbytes, which cannot be")
    assert "pip install 'bitsandbytes>=0.50,<1'" in message
    assert message.endswith("or set optimizer.name: adamw.")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_4bit", "muon"])
def test_a_small_bdh_trains_with_it(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "mlp_internal_dim_multiplier": 8}
    model = build_model(Config.from_dict({"model": sizes, "low_precision": {"use_4bit": False}}))
    optimizer = optimizer_of(name, model, lr=1e-2)
    rows = torch.arange(4 * 33).view(4, 33) % 7
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
