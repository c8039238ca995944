"""What a start says of a run: its learning rate, its length in time, what it costs."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from config import Config
from data.sources.dataset import Source
from engine.optim.build import build_optimizer
from engine.planning.forecast import Forecast, PartTimes, TrialStep, choose_trial, forecast, measure
from engine.planning.memory import MemoryBudget
from engine.planning.stopwatch import Stopwatch, busy_cores, stopwatch
from engine.planning.summary import (
    BARS,
    cost_lines,
    learning_rate_plot,
    length_lines,
    planned_tokens,
    ratio_line,
    source_lines,
)
from engine.precision.precision import Precision
from engine.schedule import learning_rate
from engine.train_state import saves_due
from model import LanguageModel, build_model
from tests.data.parquet_folder import opened
from tests.engine.planned_runs import CPU, configured, estimator_of

TIMES = PartTimes(
    micro_step=0.5, update=0.1, evaluation_batch=0.2, rounding=0.0, matmul_flops=1e12, tokens=1
)


def small(**sections: dict[str, Any]) -> Config:
    """Returns the config of a run whose step is as small as can be."""
    model = {"n_embd": 32, "n_head": 2} | sections.pop("model", {})
    if model.get("name", "bdh") == "bdh":
        model.setdefault("mlp_internal_dim_multiplier", 4)
    training = {"block_size": 32, "learning_rate": 1e-3} | sections.pop("training", {})
    return configured(model=model, training=training, **sections)


def predicted(
    config: Config, steps: int, times: PartTimes = TIMES, world_size: int = 1
) -> Forecast:
    return forecast(config, times, build_model(config), range(steps), world_size)


def bars(line: str) -> str:
    return line.split("│")[1] if "│" in line else ""


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_the_plot_of_the_learning_rate_is_as_high_as_the_rate(name: str) -> None:
    for steps in (1, 2, 7, 300, 100_000):
        config = small(training={"max_iters": steps}, schedule={"name": name})
        lines = learning_rate_plot(config, steps, width=40, height=5)
        rows = [bars(line).ljust(40) for line in lines if "│" in line]
        assert len(rows) == 5 and all(len(row) == 40 for row in rows)
        peak = max(learning_rate(step, config, steps) for step in range(1, min(steps, 9999) + 1))
        heights = [sum(BARS.index(row[place]) for row in rows) / 40 for place in range(40)]
        for place, height in enumerate(heights):
            rate = learning_rate(1 + (steps - 1) * place // 39, config, steps)
            assert height == pytest.approx(rate / peak, abs=1 / 40)


def test_the_plot_names_peak_end_and_warm_up() -> None:
    lines = learning_rate_plot(
        small(training={"max_iters": 1000}, schedule={"warmup_iters": 250}), 1000, width=41
    )
    assert lines[0] == (
        "Learning rate: 1.00e-03 at its peak, 1.00e-04 at the end, warm-up over 250 steps"
    )
    assert lines[-1].split() == ["1", "1,000", "steps"]
    assert lines[-2].index("┴") - lines[-2].index("└") - 1 == 10  # a quarter of the way
    assert {len(line) for line in lines[-2:]} == {51}
    lines = learning_rate_plot(small(schedule={"warmup_iters": 0}), 100)
    assert "no warm-up" in lines[0] and "┴" not in "".join(lines)
    # The data ends a run before its peak: bars are drawn against the highest rate that it reaches.
    config = small(training={"max_iters": 1000}, schedule={"warmup_iters": 1000})
    lines = learning_rate_plot(config, 10)
    assert "1.00e-05 at its peak" in lines[0] and bars(lines[1])[-1] == "█"


def test_saves_are_counted_as_the_run_makes_them() -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({"checkpoint_freq": 40}, 3),
        ({"checkpoint_freq": None}, 1),
        ({"checkpoint_freq": None, "save_every": 60.0}, 10),
        ({"save_model": False}, 0),
        ({"always_save_checkpoint": False, "test_freq": 25}, 4),
    ]
    for options, count in cases:
        assert saves_due(small(training=options).training, 0, 100, seconds=600) == count, options


def test_the_time_of_a_run_is_that_of_its_parts() -> None:
    config = small(training={"gradient_accumulation_steps": 3, "test_freq": 50, "eval_iters": 5})
    found = predicted(config, 100)
    assert found.step == pytest.approx(3 * 0.5 + 0.1)
    assert found.evaluation == pytest.approx((2 * 5 + 1) * 0.2)  # and one to count neurons
    assert found.total == pytest.approx(160 + 2 * 2.2 + found.save, rel=1e-3)
    sources = [{"name": name, "weight": 1, "parquet_dir": "x"} for name in "ab"]
    mixed = replace(config, dataset=Config.from_dict({"dataset": {"mixture": sources}}).dataset)
    assert predicted(mixed, 100).evaluation == pytest.approx((2 * 2 * 3 + 1) * 0.2)


def test_several_processes_share_steps_and_evaluations() -> None:
    training = {"tokens_per_step": 32 * 4 * 6, "test_freq": 50, "eval_iters": 5}
    config = small(training=training)
    alone, shared = predicted(config, 100), predicted(config, 100, world_size=2)
    assert alone.step - 0.1 == pytest.approx(2 * (shared.step - 0.1))
    assert shared.evaluation == pytest.approx((2 * 3 + 1) * 0.2)
    assert shared.flops < alone.flops
    assert "exchange" in shared.line(2) and "exchange" not in alone.line()


def test_rounded_weights_take_longer_in_the_part_of_the_run_that_has_them() -> None:
    config = small(low_precision={"use_4bit": True, "quantize_after": 0.75})
    times = replace(TIMES, rounding=0.4)
    found = predicted(config, 100, times)
    assert found.step == pytest.approx(0.6 + 0.25 * 0.4)
    assert found.evaluation == pytest.approx((3 * 50 + 1) * 0.2 + 0.4)


def test_the_line_names_every_part_and_the_share_of_a_plain_product() -> None:
    found = Forecast(
        steps=3000, step=0.2, evaluations=7, evaluation=8.14, saves=1, save=0.4,
        flops=6.1e11, share=0.61,
    )  # fmt: skip
    assert found.line() == (
        "Time: about 10m57s on this device: 3,000 steps of 0.2 s (610 GFLOP/s, 61% of a plain "
        "product's rate), 7 evaluations of 8.14 s, 1 save of 0.4 s"
    )


@pytest.mark.parametrize("use_4bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_parts_of_a_run_are_measured_on_its_own_objects(
    use_4bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if use_4bit:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("engine.planning.stopwatch.ENOUGH_S", 0.0)
    config = small(low_precision={"use_4bit": use_4bit})
    model, precision = build_model(config), Precision(config.low_precision, CPU.device)
    precision.prepare(model, 10)
    optimizer = build_optimizer(model, config.optimizer, 0.1)
    times = measure(
        model, optimizer, precision, TrialStep(config, [(4, 32)]), Stopwatch(CPU.device)
    )
    assert min(times.micro_step, times.update, times.evaluation_batch, times.matmul_flops) > 0
    assert (times.rounding > 0) is use_4bit
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_fastest_time_counts_and_the_first_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    took = iter([0.5, 0.9, 0.2, 0.4, 90.0])
    clock = [0.0]
    monkeypatch.setattr("engine.planning.stopwatch.time.perf_counter", lambda: clock[0])

    def trial() -> None:
        clock[0] += next(took)

    watch = Stopwatch(CPU.device, until=1.9, clock=lambda: clock[0], scale=0.5)
    assert watch.fastest(trial) == pytest.approx(0.1)
    assert next(took) == 90.0, "no trial is begun after the time is up"


def test_a_busy_machine_is_timed_with_the_threads_that_others_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    cores = os.cpu_count() or 1
    for busy, left in ((0.0, threads), (float(cores), 1), (cores + 5.0, 1)):
        clock = time.perf_counter if busy == 0 else time.thread_time
        monkeypatch.setattr("engine.planning.stopwatch.busy_cores", lambda busy=busy: busy)
        with stopwatch(CPU.device, budget_s=1.0) as watch:
            assert torch.get_num_threads() == left
            assert watch.scale == left / threads and watch.clock is clock
        assert torch.get_num_threads() == threads
    missing = busy_cores(tmp_path / "none")
    assert missing == 0.0


def test_plain_products_have_a_rate() -> None:
    assert Stopwatch(CPU.device).matmul_rate(torch.float32) > 1e8


def trial_of(config: Config, free: int | None = None) -> TrialStep:
    return choose_trial(estimator_of(config, base=0), MemoryBudget(0, free), build_model)


def test_micro_steps_grow_in_length_then_in_number_up_to_the_runs_own() -> None:
    config = small(training={"batch_size": 6, "block_size": 256})
    assert trial_of(config).sizes == [(1, 256), (2, 256), (4, 256), (6, 256)]
    assert trial_of(small()).sizes == [(2, 32), (4, 32)]
    one = small(training={"batch_size": 1, "block_size": 100})
    assert trial_of(one).sizes == [(1, 100)]


def test_only_what_fits_into_memory_is_timed() -> None:
    config = small(model={"n_layer": 1}, training={"batch_size": 6, "block_size": 256})
    whole = estimator_of(config, base=0).memory().required
    assert trial_of(config, whole).sizes[-1] == (6, 256)
    assert trial_of(config, whole - 1).sizes[-1] == (4, 256)
    assert trial_of(config, 1).sizes == []
    long = small(model={"n_layer": 1}, training={"batch_size": 1, "block_size": 512})
    shorter = replace(long, training=replace(long.training, block_size=128))
    least = estimator_of(shorter, base=0).memory().required
    assert trial_of(long, least).sizes == [(1, 64), (1, 128)], "few tokens where no more fit"


def test_layers_are_left_out_before_a_micro_step_is_timed_in_a_smaller_size() -> None:
    config = small(model={"name": "gpt", "n_layer": 8}, training={"block_size": 1024})
    fewer = replace(config, model=replace(config.model, n_layer=2))
    found = trial_of(config, estimator_of(fewer, base=0).memory().required)
    assert found.config.model.n_layer == 2 and found.sizes[-1] == (4, 1024)


def test_a_forecast_from_a_small_part_of_a_micro_step_is_called_rough() -> None:
    trial = TrialStep(small(training={"batch_size": 1, "block_size": 1024}), [], flops_ratio=16.0)
    assert trial.is_rough(512) and not trial.is_rough(1024)


def test_a_model_of_many_weights_is_timed_with_fewer_layers_on_a_cpu() -> None:
    config = small(model={"name": "gpt", "n_layer": 64, "n_embd": 1024, "n_head": 8})
    found = trial_of(config)
    layers = found.config.model.n_layer
    assert layers <= 4
    assert found.flops_ratio == pytest.approx(64 / layers, rel=0.05)
    assert found.parameter_ratio == pytest.approx(64 / layers, rel=0.05)


class FakeModel(LanguageModel):
    """A model of one weight that takes a second per sequence and five more."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(256))
        self._clock = clock

    def flops_per_token(self, block_size: int) -> int:
        return 1000

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        self._clock[0] += 5.0 + len(tokens)
        return self.weight.sum()


def test_a_slow_micro_step_is_timed_in_a_smaller_size_and_scaled_by_its_flops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("engine.planning.stopwatch.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("engine.planning.forecast.TRIAL_S", 8.0)
    monkeypatch.setattr(Stopwatch, "matmul_rate", lambda *_: 1.0)
    config, model = small(training={"batch_size": 64}), FakeModel(clock)
    precision = Precision(config.low_precision, CPU.device)
    optimizer = build_optimizer(model, config.optimizer, 0.1)
    watch = Stopwatch(CPU.device, clock=lambda: clock[0])
    trial = TrialStep(config, [(1, 32), (2, 32), (4, 32), (64, 32)], flops_ratio=2.0)
    times = measure(model, optimizer, precision, trial, watch)
    assert times.tokens == 4 * 32, "9 seconds are enough"
    assert times.micro_step == pytest.approx(2.0 * (5 + 64), rel=0.15)
    assert times.evaluation_batch == pytest.approx(2.0 * (5 + 64), rel=0.15)


def test_a_slow_first_micro_step_is_not_the_only_one_that_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("engine.planning.stopwatch.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Stopwatch, "matmul_rate", lambda *_: 1.0)
    config, model = small(training={"batch_size": 64}), FakeModel(clock)
    precision = Precision(config.low_precision, CPU.device)
    optimizer = build_optimizer(model, config.optimizer, 0.1)
    watch = Stopwatch(CPU.device, clock=lambda: clock[0])
    times = measure(model, optimizer, precision, TrialStep(config, [(1, 32), (2, 32)]), watch)
    assert times.tokens == 2 * 32


def test_the_plan_tells_tokens_per_parameter() -> None:
    config = small()
    model = build_model(config)
    count = sum(p.numel() for p in model.parameters())
    line = ratio_line(planned_tokens(config, 2, 100), model)
    assert line.startswith(f"Tokens per parameter: {100 * 2 * 4 * 32 / count:.3g} (25.6 k tokens")


def test_a_plan_counts_the_tokens_of_steps_before_a_resume_as_they_were() -> None:
    config = small(training={"batch_size": 8, "max_iters": 60})
    line = length_lines(config, 1, 100_000, done=(40, 40 * 128))[-1]
    assert line == "Max iterations: 60 = 10.2 k tokens, about 0.10 epochs"


def test_a_plan_tells_how_often_each_source_of_a_mixture_is_read(corpus_dir: Path) -> None:
    dataset = opened(corpus_dir)
    epoch = dataset.epoch_tokens(32)
    sources = [Source("web", 3.0, dataset), Source("books", 1.0, dataset)]
    web, books = source_lines(sources, 32, 4 * epoch, {})
    assert web.startswith("Source web: 75.0% of the tokens; in the whole run ")
    assert web.endswith(", about 3.00 epochs") and books.endswith(", about 1.00 epochs")
    *_, books, warning = source_lines(sources, 32, 4 * epoch, {"books": 4 * epoch})
    assert books.startswith("Source books: 25.0% of the tokens from here on; in the whole run ")
    assert books.endswith(", about 5.00 epochs")
    assert warning.startswith("Warning: more than 4 epochs of books: text that is read again")


def test_a_start_tells_parameters_memory_and_work() -> None:
    estimator = estimator_of(small())
    optimizer = build_optimizer(estimator.model, estimator.config.optimizer, 0.1)
    lines = cost_lines(estimator, MemoryBudget.of(CPU), optimizer)
    beginnings = ["Total parameters", "Trainable parameters", "Memory of a step", "Work"]
    assert [line.split(":")[0] for line in lines] == beginnings
    for part in ("weights", "gradients", "optimizer", "activations", "the process itself"):
        assert f"B {part}" in lines[2]
