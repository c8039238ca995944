"""The learning rate as a function of the step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, ScheduleConfig, TrainingConfig
from engine.schedule import learning_rate

PEAK = 1e-3


def config_with(max_iters: int = 1000, **schedule: Any) -> Config:
    training = TrainingConfig(max_iters=max_iters, learning_rate=PEAK)
    return Config(training=training, schedule=ScheduleConfig(**schedule))


# Options, steps of the run, step, and its learning rate.
RATES: list[tuple[dict[str, Any], int, int, float]] = [
    ({"warmup_iters": 2000}, 100_000, 100, PEAK / 20),
    ({"warmup_iters": 2000}, 100_000, 2000, PEAK),
    ({}, 1000, 1000, PEAK / 10),  # the floor, by default
    *(
        (
            {"name": name, "warmup_iters": 10, "min_lr": 1e-5, "lr_decay_iters": 500},
            1000,
            step,
            1e-5,
        )
        for name in ("cosine", "linear", "wsd")
        for step in (500, 5000)
    ),
    ({"warmup_iters": 0, "min_lr": 0.0}, 1000, 500, PEAK / 2),  # cosine, half way
    ({}, 100, 3, PEAK),  # the data ends the run after 100 of its `max_iters`
    ({}, 100, 100, PEAK / 10),
    (
        {"name": "wsd", "warmup_iters": 10, "min_lr": 0.0, "wsd_decay_fraction": 0.2},
        1000,
        800,
        PEAK,
    ),
    (
        {"name": "wsd", "warmup_iters": 10, "min_lr": 0.0, "wsd_decay_fraction": 0.2},
        1000,
        900,
        PEAK / 2,
    ),
    ({"warmup_iters": 10, "decay_lr": False}, 1000, 5, PEAK / 2),
    ({"warmup_iters": 10, "decay_lr": False}, 1000, 10_000, PEAK),
    ({"warmup_iters": 10, "name": "constant"}, 1000, 10_000, PEAK),
]


@pytest.mark.parametrize(("options", "total", "step", "rate"), RATES, ids=str)
def test_the_rate_follows_the_schedule(
    options: dict[str, Any], total: int, step: int, rate: float
) -> None:
    config = config_with(100_000 if total in (100, 100_000) else total, **options)
    assert learning_rate(step, config, total) == pytest.approx(rate)


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
    assert 0.0 < learning_rate(step, config, max_iters) <= PEAK


@given(st.integers(50, 400), st.integers(50, 400))
def test_with_wsd_runs_of_all_lengths_share_the_steps_before_their_decay(a: int, b: int) -> None:
    """So that a fork of the longer one at the decay of the shorter one is the shorter run."""
    shorter, longer = (
        config_with(length, name="wsd", warmup_iters=10) for length in sorted((a, b))
    )
    length, whole = min(a, b), max(a, b)
    begin = length - round(length * 0.2)
    for step in range(1, begin + 1):
        assert learning_rate(step, shorter, length) == learning_rate(step, longer, whole)
    assert learning_rate(begin + 1, shorter, length) < PEAK
