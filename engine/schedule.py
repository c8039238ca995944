"""The learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from config import Config, warmup_steps


def learning_rate(step: int, config: Config, total: int) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 1, of `total` steps.

    During warm-up it is `learning_rate * step / warmup_iters`. It then follows `schedule.name`
    until `lr_decay_iters` and stays at `min_lr`.
    """
    schedule, peak = config.schedule, config.training.learning_rate
    warmup = warmup_steps(config, total)
    if step < warmup:
        return peak * step / warmup
    if not schedule.decay_lr or schedule.name == "constant":
        return peak
    floor = peak / 10 if schedule.min_lr is None else schedule.min_lr
    # By default the decay ends with the run, also where the data ends it before `max_iters`.
    end = schedule.lr_decay_iters or total
    start = warmup
    if schedule.name == "wsd":
        start = max(warmup, end - round(end * schedule.wsd_decay_fraction))
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    if schedule.name == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak + (floor - peak) * progress
