"""The learning rate as a function of the step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, ScheduleConfig, TrainingConfig
from engine.schedule import learning_rate


def rate(step: int, config: Config) -> float:
    return learning_rate(step, config, config.training.max_iters)


def config_with(max_iters: int = 1000, peak: float = 1e-3, **schedule: Any) -> Config:
    training = TrainingConfig(max_iters=max_iters, learning_rate=peak)
    return Config(training=training, schedule=ScheduleConfig(**schedule))


def test_warm_up_is_the_peak_times_step_over_warmup() -> None:
    config = config_with(100_000, 6e-4, warmup_iters=2000)
    assert f"{rate(100, config):.2e}" == "3.00e-05"
    assert f"{rate(200, config):.2e}" == "6.00e-05"
    assert rate(2000, config) == pytest.approx(6e-4)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_decay_ends_at_the_floor_and_stays_there(name: str) -> None:
    config = config_with(name=name, warmup_iters=10, min_lr=1e-5, lr_decay_iters=500)
    assert rate(500, config) == pytest.approx(1e-5)
    assert rate(5000, config) == pytest.approx(1e-5)


def test_the_floor_is_a_tenth_of_the_peak_by_default() -> None:
    assert rate(1000, config_with()) == pytest.approx(1e-4)


def test_cosine_is_half_way_in_the_middle() -> None:
    config = config_with(warmup_iters=0, min_lr=0.0)
    assert rate(500, config) == pytest.approx(5e-4)


def test_a_run_that_epochs_ends_early_decays_to_its_own_end() -> None:
    config = config_with(100_000)
    assert learning_rate(3, config, 100) == pytest.approx(1e-3)
    assert learning_rate(100, config, 100) == pytest.approx(1e-4)


def test_wsd_holds_the_peak_until_its_last_fraction() -> None:
    config = config_with(name="wsd", warmup_iters=10, min_lr=0.0, wsd_decay_fraction=0.2)
    assert rate(800, config) == 1e-3
    assert rate(900, config) == pytest.approx(5e-4)


@pytest.mark.parametrize("schedule", [{"decay_lr": False}, {"name": "constant"}])
def test_without_decay_the_peak_stays(schedule: dict[str, Any]) -> None:
    config = config_with(warmup_iters=10, **schedule)
    assert rate(5, config) == pytest.approx(5e-4)
    assert rate(10_000, config) == 1e-3


@settings(deadline=None)
@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    max_iters=st.integers(1, 3000),
    step=st.integers(1, 4000),
    warmup=st.none() | st.integers(0, 3000),
)
def test_rate_is_positive_and_never_above_the_peak(
    name: str, max_iters: int, step: int, warmup: int | None
) -> None:
    warmup = None if warmup is None else min(warmup, max_iters)
    config = config_with(max_iters, name=name, warmup_iters=warmup)
    assert 0.0 < rate(step, config) <= 1e-3
