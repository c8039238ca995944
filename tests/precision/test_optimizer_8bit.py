"""bitsandbytes' AdamW with moments in 8 bits, as the optimizer of a run."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import Tensor, nn

from config import ConfigError, OptimizerConfig
from engine.checkpoint.contents import check_plain
from engine.optim.build import build_optimizer, load_optimizer, optimizer_lines, state_bytes

EIGHT_BIT = OptimizerConfig(name="adamw_8bit")


class Toy(nn.Module):
    """A matrix in 8 bits, a matrix and a vector in float32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw).to(dtype))

        self.matrix, self.small, self.gain = weights(128, 64), weights(8, 8), weights(64)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for seed in range(first, last):
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=draw) * 0.01
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


@pytest.fixture(autouse=True)
def library(request: pytest.FixtureRequest) -> None:
    if "library" not in request.node.name:
        pytest.importorskip("bitsandbytes")


def test_its_steps_are_close_to_adamws_and_only_matrices_decay() -> None:
    ours, theirs, start = Toy(), Toy(), Toy()
    optimizer = build_optimizer(ours, EIGHT_BIT, 0.1)
    steps(ours, optimizer, 0, 5)
    steps(theirs, build_optimizer(theirs, OptimizerConfig(), 0.1), 0, 5)
    torch.testing.assert_close(ours.small, theirs.small)
    torch.testing.assert_close(ours.gain, theirs.gain)
    moved = theirs.matrix - start.matrix
    assert 0 < (ours.matrix - theirs.matrix).norm() < 0.05 * moved.norm()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_its_size_is_known_from_the_start() -> None:
    model = Toy()
    optimizer = build_optimizer(model, EIGHT_BIT, 0.1)
    size, low, others = state_bytes(optimizer)
    assert (low, others) == (128 * 64, 8 * 8 + 64)
    assert size == 2 * low + 2 * 4 * low // 256 + 2 * 1024  # codes, scales, tables
    assert optimizer_lines(optimizer) == [
        "AdamW with 8-bit moments: 2.281 bytes for each of 8,192 parameters; 128 in float32"
    ]
    steps(model, optimizer, 0, 2)
    assert state_bytes(optimizer) == (size, low, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    whole, broken = Toy(dtype), Toy(dtype)
    steps(whole, build_optimizer(whole, EIGHT_BIT, 0.1), 0, 6)
    first = build_optimizer(broken, EIGHT_BIT, 0.1)
    steps(broken, first, 0, 3)
    check_plain(first.state_dict())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build_optimizer(broken, EIGHT_BIT, 0.1)
    load_optimizer(second, torch.load(file, weights_only=True))
    for saved, loaded in zip(first.state.values(), second.state.values(), strict=True):
        for name, value in saved.items():
            if isinstance(value, Tensor):
                assert value.dtype == loaded[name].dtype and torch.equal(value, loaded[name])
    assert second.state[broken.matrix]["state1"].dtype == torch.uint8
    steps(broken, second, 3, 6)
    for one, other in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)


def test_hyperparameters_after_a_resume_are_those_of_the_config() -> None:
    model = Toy()
    optimizer = build_optimizer(model, EIGHT_BIT, 0.1)
    steps(model, optimizer, 0, 1)
    resumed = build_optimizer(model, EIGHT_BIT, 0.3)
    load_optimizer(resumed, optimizer.state_dict())
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.3, 0.0]


def test_without_its_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError) as caught:
        build_optimizer(Toy(), EIGHT_BIT, 0.1)
    message = str(caught.value)
    assert message.startswith("8-bit moments need bitsandbytes, which cannot be")
    assert "pip install 'bitsandbytes>=0.50,<1'" in message
    assert message.endswith("or set optimizer.name: adamw.")
