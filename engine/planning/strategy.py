"""What `distributed.strategy` and `training.recompute` become where they are `auto`: the fastest
combination that the forecast of memory allows."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import product

from config import Config, ConfigError
from engine.planning.batch_size import AUTO_SHARE, batch_size_candidates, with_batch
from engine.planning.memory import MemoryBudget, MemoryEstimator
from settings.formatting import format_bytes


def strategy_choices(config: Config, world_size: int) -> list[Config]:
    """Returns the config with each pair of values that its `auto` may become, the fastest first.

    Sharding comes before recomputation: it moves the weights once more between processes, which
    overlaps with computing, and recomputing a layer adds a third to the work. What a rule of
    settings/constraints.py excludes is left out.
    """
    strategies, recomputes = [config.distributed.strategy], [config.training.recompute]
    if strategies == ["auto"]:
        strategies = ["ddp", "fsdp"] if world_size > 1 else ["ddp"]
    if recomputes == ["auto"]:
        recomputes = ["none", "layer"]
    found = list[Config]()
    for recompute, strategy in product(recomputes, strategies):
        with contextlib.suppress(ConfigError):
            found.append(
                replace(
                    config,
                    distributed=replace(config.distributed, strategy=strategy),
                    training=replace(config.training, recompute=recompute),
                )
            )
    return found


def first_that_fits(
    choices: list[Config], estimator: MemoryEstimator, budget: MemoryBudget
) -> tuple[Config, list[str]]:
    """Returns the first choice that fits on all processes, else the last; and a line that says why
    it is not the first.

    With `training.batch_size: auto` a choice fits if one sequence at a time does: smaller
    micro-batches cost less than what comes later in the list. A collective: all processes call it.
    """
    peaks = list[int]()
    for choice in choices:
        memory = estimator.memory(_with_smallest_batch(choice, estimator.world.size))
        peaks.append(memory.required)
        fits = budget.fits(memory, AUTO_SHARE) is not False
        if not estimator.world.any_rank(not fits):
            break
    chosen = choices[len(peaks) - 1]
    if len(peaks) == 1:
        return chosen, []
    total = None if budget.total is None else estimator.world.all_reduce_min(budget.total)
    return chosen, [_reason(choices[0], chosen, peaks[0], estimator.world.size, total)]


def _with_smallest_batch(config: Config, world_size: int) -> Config:
    if config.training.batch_size != "auto":
        return config
    return with_batch(config, batch_size_candidates(config, world_size)[-1])


def _reason(
    first: Config, chosen: Config, first_peak: int, world_size: int, total: int | None
) -> str:
    """Returns the line about a choice that is not the first; total: memory of the process that has
    least."""
    changes, without = [], "all activations kept"
    if chosen.distributed.strategy != first.distributed.strategy:
        changes.append(f"sharded over {world_size} processes")
        without = "a replica"
    if chosen.training.recompute != first.training.recompute:
        changes.append("layers recompute their activations")
    what = " and ".join(changes)
    there = "" if total is None else f" of {format_bytes(total)}"
    return f"{what[:1].upper()}{what[1:]}: {without} would need {format_bytes(first_peak)}{there}"
