"""What `training.batch_size: auto` becomes: the largest micro-batch that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from config import FP8_MULTIPLE, Config, ConfigError
from engine.hardware.distributed import World
from engine.hardware.memory import ran_out
from engine.planning.memory import MemoryBudget, MemoryEstimator
from settings.formatting import format_bytes

AUTO_SHARE = 0.9  # of the free memory that `batch_size: auto` fills
MAX_SEQUENCES = 10**9  # of a step whose divisors `batch_size: auto` tries


def divisors_below(number: int) -> list[int]:
    """Returns the divisors of a number without itself, the largest first."""
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    found = {*small, *(number // each for each in small)} - {number}
    return sorted(found, reverse=True)


def is_allowed(config: Config, batch: int) -> bool:
    """Returns whether the run's number format takes micro-batches of so many sequences."""
    tokens = batch * config.training.block_size
    return not config.low_precision.use_fp8 or tokens % FP8_MULTIPLE == 0


def batch_size_candidates(config: Config, world_size: int) -> list[int]:
    """Returns the micro-batches that divide `tokens_per_step`, the largest first.

    Raises ConfigError where there are none.
    """
    training = config.training
    tokens, row = training.tokens_per_step, training.block_size * world_size
    assert tokens is not None  # a rule of `auto`
    if tokens % row:
        raise ConfigError(
            f"training.tokens_per_step={tokens} is not a multiple of training.block_size="
            f"{training.block_size} * {world_size} processes, so no batch_size makes it up."
        )
    sequences = tokens // row
    if sequences > MAX_SEQUENCES:
        raise ConfigError(
            f"training.tokens_per_step={tokens} is {sequences:,} sequences of training.block_size="
            f"{training.block_size}; batch_size=auto takes at most {MAX_SEQUENCES:,}."
        )
    found = [each for each in (sequences, *divisors_below(sequences)) if is_allowed(config, each)]
    if not found:
        raise ConfigError(
            f"low_precision.use_fp8 takes multiples of {FP8_MULTIPLE} tokens, which no "
            f"training.batch_size gives with training.block_size={training.block_size}."
        )
    return found


def with_batch(config: Config, batch: int, eval_batch: int | None = None) -> Config:
    """Returns the config with this micro-batch; eval_batch: of evaluations, where it has none.

    The evaluated rows must not depend on how much memory was free when a run began.
    """
    given = config.training.eval_batch_size or eval_batch
    sized = replace(config.training, batch_size=batch, eval_batch_size=given)
    return replace(config, training=sized)


def predict_batch_sizes(estimator: MemoryEstimator, budget: MemoryBudget) -> tuple[list[int], str]:
    """Returns the micro-batches that are predicted to fit, the largest first, and a line that says
    which one `training.batch_size: auto` takes and why.

    Raises ConfigError where none fits or the memory cannot be known.
    """
    config, device = estimator.config, estimator.world.device
    if budget.free is None:
        raise ConfigError(
            f"training.batch_size=auto: the free memory of {device} is not known here. Give a "
            "number."
        )
    sizes = batch_size_candidates(config, estimator.world.size)
    memories = [estimator.memory(with_batch(config, each)) for each in sizes]
    if not memories[0].complete:
        raise ConfigError(
            f"training.batch_size=auto: model/memory.py has no formula for model.name="
            f"{config.model.name}. Give a number."
        )
    places = [place for place, each in enumerate(memories) if budget.fits(each, AUTO_SHARE)]
    if not places:
        least = memories[-1]
        raise ConfigError(
            f"training.batch_size=auto: {sizes[-1]} at a time need {format_bytes(least.required)} "
            f"({least.parts()}), and it may fill {AUTO_SHARE:.0%} of the "
            f"{format_bytes(budget.free)} free. Lower training.block_size or the size of the model."
        )
    first = places[0]
    why = "a whole step at once"
    if first:
        why = f"{sizes[first - 1]} would need {format_bytes(memories[first - 1].required)}"
    line = (
        f"Batch size: {sizes[first]} of {sizes[0]} sequences, "
        f"{format_bytes(memories[first].required)}: the largest that fits in "
        f"{AUTO_SHARE:.0%} of {format_bytes(budget.free)} free ({why})"
    )
    return [sizes[place] for place in places], line


def find_batch_size_by_trial(
    sizes: list[int], attempt: Callable[[int], object], world: World
) -> int:
    """Returns the first of `sizes` with which a trial step runs out of memory on no process.

    A collective: all processes call it. Raises ConfigError where all sizes run out.
    """
    for batch in sizes:
        failed = False
        try:
            attempt(batch)
        except Exception as error:
            if not ran_out(error):
                raise
            # The error keeps the step's tensors alive until this block ends, so the cache is
            # emptied after it.
            failed = True
        if failed and world.device.type == "cuda":
            torch.cuda.empty_cache()
        if not world.any_rank(failed):
            return batch
    raise ConfigError(
        f"training.batch_size=auto: even {sizes[-1]} runs out of memory. Lower training.block_size "
        "or the size of the model."
    )
