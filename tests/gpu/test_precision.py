"""Number formats and optimizers on a GPU against the same on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from config import ConfigError, Fp8Config, LowPrecisionConfig, OptimizerConfig
from engine.optim.build import build_optimizer
from engine.precision.fp8_native import E4M3, E5M2, NativeMatmul
from engine.precision.precision import Precision
from model import LanguageModel
from model.matmul import OperandId
from tests.gpu.devices import DEVICE, gpu_tests
from tests.precision.conftest import build, gradients_of, loss_of
from tests.precision.optimizer_runs import Toy, gradients, optimizer_of

pytestmark = gpu_tests
CPU = torch.device("cpu")
ROWS = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1))
# Of three updates together, relative. Muon's products are in 16 bits where those are fast, and a
# moment in few bits that lies between two levels may be rounded to either.
UPDATE_LIMITS = {"adamw": 1e-4, "adamw_4bit": 0.1, "adamw_8bit": 0.1, "muon": 0.1}


def with_fp8(recipe: str) -> Precision:
    low = LowPrecisionConfig(use_fp8=True, use_4bit=False)
    fp8 = Fp8Config(backend="native", recipe=recipe, format="hybrid", amax_history_len=4)  # type: ignore[arg-type]
    try:
        return Precision(low, DEVICE, fp8)
    except ConfigError as refusal:
        pytest.skip(str(refusal))


def step(model: LanguageModel, precision: Precision, number: int = 1) -> dict[str, Tensor]:
    """Loss and gradients of a training step, which takes no update."""
    model.zero_grad()
    with precision.training(number):
        with precision.autocast():
            loss = loss_of(model, ROWS.to(DEVICE))
        precision.backward(loss)
    return {"loss": loss.detach(), **gradients_of(model)}


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("name", ["bdh", "gpt", "llama"])
def test_a_step_in_fp8_is_close_to_one_in_bfloat16(name: str, recipe: str) -> None:
    precision = with_fp8(recipe)
    model = build(name).to(DEVICE)
    expected = step(model, Precision(LowPrecisionConfig(use_4bit=False), DEVICE))
    precision.prepare(model, 10)
    for number in (1, 2):  # the first one of delayed scaling has no history
        found = step(model, precision, number)
        if precision.fp8 is not None:
            precision.fp8.end_step(torch.clone)
    assert precision.metrics()["train/fp8_products"] > 0
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.02)
    for key, value in expected.items():
        difference = (found[key].float() - value.float()).norm()
        assert difference < 0.3 * value.float().norm(), key


@pytest.mark.slow
def test_a_compiled_step_in_fp8_is_close_to_an_eager_one() -> None:
    for name in ("bdh", "gpt"):
        precision, model = with_fp8("current"), build(name).to(DEVICE)
        precision.prepare(model, 10)
        expected = step(model, precision)
        model.compile()
        found = step(model, precision)
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.01)


@pytest.mark.parametrize("fmt", ["hybrid", "e4m3"])
def test_the_products_of_fp8_are_those_that_a_cpu_makes(fmt: str) -> None:
    with_fp8("current")
    x_id, dy_id = OperandId("x", 0), OperandId("dy", 0)
    draw, found = torch.Generator(), []
    for device in (CPU, DEVICE):
        draw.manual_seed(0)
        shapes = (2, 64, 32), (2, 32, 48), (2, 64, 48)
        x, w, dy = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
        backend = NativeMatmul(E4M3, E5M2 if fmt == "hybrid" else E4M3, torch.bfloat16)
        operands = backend.activation(x, x_id), backend.weight(w, "w"), backend.gradient(dy, dy_id)
        made = (
            backend.forward(operands[0], operands[1]),
            backend.grad_input(operands[2], operands[1]),
            backend.grad_weight(operands[0], operands[2]),
        )
        found.append([each.float().cpu() for each in made])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_float16_skips_a_step_that_overflows_and_takes_the_next() -> None:
    precision = Precision(LowPrecisionConfig(compute_dtype="float16"), DEVICE)
    model = nn.Linear(2, 1, bias=False).to(DEVICE)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig(), weight_decay=0.0)
    for factor, scale, moved in ((torch.inf, 32768.0, False), (1.0, 32768.0, True)):
        precision.backward((model(torch.ones(1, 2, device=DEVICE)) * factor).sum())
        precision.unscale(optimizer)
        precision.step(optimizer, torch.clone)
        optimizer.zero_grad()
        assert precision.state_dict()["scaler"]["scale"] == scale
        assert torch.equal(model.weight, before) != moved


@pytest.mark.parametrize("name", UPDATE_LIMITS)
def test_three_steps_of_an_optimizer_move_weights_as_on_a_cpu(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    moved = []
    for device in (CPU, DEVICE):
        model = Toy().to(device)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = optimizer_of(name, model)
        for seed in range(3):
            for key, gradient in gradients(Toy(), seed).items():
                model.get_parameter(key).grad = gradient.to(device)
            optimizer.step()
        moved.append({n: (p.detach() - before[n]).cpu() for n, p in model.named_parameters()})
    for key, expected in moved[0].items():
        difference = float((moved[1][key] - expected).norm())
        assert difference <= UPDATE_LIMITS[name] * float(expected.norm()), key
