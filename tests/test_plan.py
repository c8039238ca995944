"""What a start says of a run: its learning rate, its length in time, what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from config import Config
from engine.forecast import (
    Forecast,
    Rates,
    forecast,
    matmul_rate,
    measure,
    scaled,
    seconds_of,
    trial_config,
)
from engine.memory import Needs, Room
from engine.optimizer import build_optimizer
from engine.plan import BARS, learning_rate_plot, model_lines, ratio_line
from engine.precision import Precision
from engine.schedule import learning_rate
from engine.state import saves_due
from engine.world import World
from model import build_model

CPU = World(0, 1, torch.device("cpu"))
RATES = Rates(micro_step=0.5, update=0.1, evaluation_batch=0.2, rounding=0.0, matmul=1e12)


def configured(**sections: dict[str, Any]) -> Config:
    defaults: dict[str, dict[str, Any]] = {
        "model": {"n_layer": 2, "n_embd": 32, "n_head": 2, "mlp_internal_dim_multiplier": 4},
        "training": {"block_size": 32, "batch_size": 4, "learning_rate": 1e-3},
        "low_precision": {"use_4bit": False},
        "system": {"device": "cpu"},
    }
    names = defaults.keys() | sections.keys()
    return Config.from_dict({n: defaults.get(n, {}) | sections.get(n, {}) for n in names})


def predicted(config: Config, steps: int, rates: Rates = RATES, world_size: int = 1) -> Forecast:
    return forecast(config, rates, build_model(config), range(steps), world_size)


def bars(line: str) -> str:
    return line.split("│")[1] if "│" in line else ""


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 300, 100_000])
def test_the_plot_of_the_learning_rate_is_as_high_as_the_rate(name: str, steps: int) -> None:
    config = configured(training={"max_iters": steps}, schedule={"name": name})
    lines = learning_rate_plot(config, steps, width=40, height=5)
    rows = [bars(line).ljust(40) for line in lines if "│" in line]
    assert len(rows) == 5 and all(len(row) == 40 for row in rows)
    peak = max(learning_rate(step, config, steps) for step in range(1, min(steps, 9999) + 1))
    heights = [sum(BARS.index(row[place]) for row in rows) / 40 for place in range(40)]
    for place, height in enumerate(heights):
        rate = learning_rate(1 + (steps - 1) * place // 39, config, steps)
        assert height == pytest.approx(rate / peak, abs=1 / 40)


def test_the_plot_names_peak_end_and_warm_up() -> None:
    config = configured(training={"max_iters": 1000}, schedule={"warmup_iters": 250})
    lines = learning_rate_plot(config, 1000, width=41)
    assert (
        lines[0]
        == "Learning rate: 1.00e-03 at its peak, 1.00e-04 at the end, warm-up over 250 steps"
    )
    assert lines[-1].split() == ["1", "1,000", "steps"]
    assert lines[-2].index("┴") - lines[-2].index("└") - 1 == 10  # a quarter of the way
    assert {len(line) for line in lines[-2:]} == {51}


def test_the_plot_of_a_run_without_warm_up_marks_none() -> None:
    config = configured(training={"max_iters": 100}, schedule={"warmup_iters": 0})
    lines = learning_rate_plot(config, 100)
    assert "no warm-up" in lines[0] and "┴" not in "".join(lines)


def test_a_rate_that_never_reaches_the_peak_is_drawn_against_the_highest_one() -> None:
    config = configured(training={"max_iters": 1000}, schedule={"warmup_iters": 1000})
    lines = learning_rate_plot(config, 10)  # the data ends first
    assert "1.00e-05 at its peak" in lines[0] and bars(lines[1])[-1] == "█"


@pytest.mark.parametrize(
    "options, count",
    [
        ({"checkpoint_freq": 40}, 3),
        ({"checkpoint_freq": None}, 1),
        ({"checkpoint_freq": None, "save_every": 60.0}, 10),
        ({"save_model": False}, 0),
        ({"always_save_checkpoint": False, "test_freq": 25}, 4),
    ],
)
def test_saves_are_counted_as_the_run_makes_them(options: dict[str, Any], count: int) -> None:
    assert saves_due(configured(training=options).training, 0, 100, seconds=600) == count


def test_the_time_of_a_run_is_that_of_its_parts() -> None:
    config = configured(
        training={"gradient_accumulation_steps": 3, "test_freq": 50, "eval_iters": 5}
    )
    found = predicted(config, 100)
    assert found.step == pytest.approx(3 * 0.5 + 0.1)
    assert found.evaluation == pytest.approx((2 * 5 + 1) * 0.2)  # and one to count neurons
    assert found.total == pytest.approx(160 + 2 * 2.2 + found.save, rel=1e-3)
    assert replace(found, compile_s=20.0).total == pytest.approx(found.total + 20)


def test_several_processes_share_steps_and_evaluations() -> None:
    training = {"tokens_per_step": 32 * 4 * 6, "test_freq": 50, "eval_iters": 5}
    config = configured(training=training)
    alone, shared = predicted(config, 100), predicted(config, 100, world_size=2)
    assert alone.step - 0.1 == pytest.approx(2 * (shared.step - 0.1))
    assert shared.evaluation == pytest.approx((2 * 3 + 1) * 0.2)
    assert shared.flops < alone.flops
    assert "exchange" in shared.line(2) and "exchange" not in alone.line()


def test_rounded_weights_take_longer_in_the_part_of_the_run_that_has_them() -> None:
    config = configured(low_precision={"use_4bit": True, "quantize_after": 0.75})
    rates = replace(RATES, rounding=0.4)
    found = predicted(config, 100, rates)
    assert found.step == pytest.approx(0.6 + 0.25 * 0.4)
    assert found.evaluation == pytest.approx((3 * 50 + 1) * 0.2 + 0.4)


def test_the_line_names_every_part_and_the_share_of_a_plain_product() -> None:
    found = Forecast(
        steps=3000, step=0.2, evaluations=7, evaluation=8.14, saves=1, save=0.4,
        flops=6.1e11, share=0.61, compile_s=13.0,
    )  # fmt: skip
    assert found.line() == (
        "Time: about 11m10s on this device: 3,000 steps of 0.2 s (610 GFLOP/s, 61% of a plain "
        "product's rate), 7 evaluations of 8.14 s, 1 save of 0.4 s, 13 s to compile"
    )


@pytest.mark.parametrize("use_4bit", [False, True])
def test_the_parts_of_a_run_are_measured_on_its_own_objects(
    use_4bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if use_4bit:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("engine.forecast.ENOUGH_S", 0.0)
    config = configured(low_precision={"use_4bit": use_4bit})
    model, precision = build_model(config), Precision(config.low_precision, CPU.device)
    precision.prepare(model, 10)
    optimizer = build_optimizer(model, config.optimizer, 0.1)
    rates = measure(model, optimizer, precision, config)
    assert min(rates.micro_step, rates.update, rates.evaluation_batch, rates.matmul) > 0
    assert (rates.rounding > 0) is use_4bit
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_first_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 0.0, 2.0, 0.0, 2.5, 0.0, 3.0])  # begin and end of each
    monkeypatch.setattr("engine.forecast.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("engine.forecast.ENOUGH_S", 5.0)
    assert seconds_of(lambda: None, CPU.device) == 2.5


def test_plain_products_have_a_rate() -> None:
    assert matmul_rate(CPU.device, torch.float32) > 1e8


def test_a_trial_that_does_not_fit_is_made_with_one_sequence_or_not_at_all() -> None:
    config = configured(training={"batch_size": 64, "block_size": 256})
    with torch.device("meta"):
        model = build_model(config)
    needs = Needs(config, model, Precision(config.low_precision, CPU.device), CPU, base=0)
    whole = needs.memory().peak
    one = replace(config, training=replace(config.training, batch_size=1))
    assert trial_config(needs, Room(0, whole)) == config
    assert trial_config(needs, Room(0, whole - 1)) == one
    assert trial_config(needs, Room(0, needs.memory(one).peak - 1)) is None
    assert trial_config(needs, Room(0, None)) == config  # nobody tells


def test_rates_of_one_sequence_are_scaled_to_a_micro_batch() -> None:
    more = scaled(RATES, 8)
    assert (more.micro_step, more.evaluation_batch, more.update) == (4.0, 1.6, 0.1)


def test_the_plan_tells_tokens_per_parameter() -> None:
    config = configured()
    model = build_model(config)
    count = sum(p.numel() for p in model.parameters())
    line = ratio_line(config, World(0, 2, torch.device("cpu")), 100, model)
    assert line.startswith(f"Tokens per parameter: {100 * 2 * 4 * 32 / count:.3g} (25.6 k tokens")


def test_a_start_tells_parameters_memory_and_work() -> None:
    config = configured()
    model, precision = build_model(config), Precision(config.low_precision, CPU.device)
    optimizer = build_optimizer(model, config.optimizer, 0.1)
    lines = model_lines(config, CPU, model, optimizer, precision)
    beginnings = ["Total parameters", "Trainable parameters", "Memory of a step", "Work"]
    assert [line.split(":")[0] for line in lines] == beginnings
    for part in ("weights", "gradients", "optimizer", "activations", "the process itself"):
        assert f"B {part}" in lines[2]
