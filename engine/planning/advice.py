"""Advice where memory is short: what a step needs, and which variants of the run would fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from config import Config, ConfigError, MemoryShortError, accumulation_steps, micro_batch
from engine.hardware.memory import free_bytes, ran_out
from engine.planning.batch_size import AUTO_SHARE, divisors_below, is_allowed
from engine.planning.memory import Memory, MemoryBudget, MemoryEstimator, shard_count
from engine.planning.strategy import strategy_choices
from settings.formatting import format_bytes

MIN_BLOCK = 64  # tokens; shorter sequences are not suggested
_WAITS = "training waits while a checkpoint is written"
_GENERAL = "Lower training.batch_size, and raise gradient_accumulation_steps with it."


def memory_lines(estimator: MemoryEstimator, budget: MemoryBudget) -> list[str]:
    """Returns what a step needs and what there is and, where it does not fit, what would fit."""
    memory, total = estimator.memory(), budget.total
    there = "" if total is None else f" of {format_bytes(total)} there are"
    copy = _copy(memory, budget)
    lines = [f"Memory of a step: {format_bytes(memory.required)}{there}: {memory.parts()}{copy}"]
    if budget.fits(memory) is False:
        lines.append(f"WARNING: it does not fit. {_advice(estimator, budget)}")
    return lines if estimator.world.on_cpu else [*lines, *_saving_lines(estimator, memory)]


def _copy(memory: Memory, budget: MemoryBudget) -> str:
    """Returns words about the copy that a checkpoint is written from, on a CPU."""
    if memory.saving == 0:
        return ""
    words = f"; {format_bytes(memory.saving)} more for a copy while saving"
    short = budget.fits(memory, copy=True) is False
    return f"{words}, for which there is no room: {_WAITS}" if short else words


def _saving_lines(estimator: MemoryEstimator, memory: Memory) -> list[str]:
    """Returns lines about the copy in host memory that a GPU's checkpoint is written from."""
    copy, free = estimator.copy_bytes(memory), free_bytes(torch.device("cpu"))
    copies = estimator.world.local_size if memory.shards > 1 else 1
    if copy == 0 or free is None:
        return []
    line = f"Saving copies {format_bytes(copies * copy)} to the host memory of a machine"
    if copies * copy <= free:
        return [f"{line}, of {format_bytes(free)} free"]
    return [f"WARNING: {line}, and {format_bytes(free)} are free: {_WAITS}"]


def out_of_memory_lines(
    error: BaseException,
    estimator: MemoryEstimator | None = None,
    budget: MemoryBudget | None = None,
) -> list[str]:
    """Returns what used the memory that ran out, and what would fit.

    budget: measured before the run.
    """
    lines = [f"Out of memory: {str(error).strip() or type(error).__name__}"]
    if estimator is None or budget is None:
        return [*lines, _GENERAL]
    memory = estimator.memory()
    lines.append(f"A step needs {format_bytes(memory.required)}: {memory.parts()}")
    total = memory.required if budget.total is None else budget.total
    # The step has just failed, so what fits needs clearly less, whatever the prediction says.
    budget = MemoryBudget(0, int(AUTO_SHARE * min(total, memory.required)))
    if memory.required >= AUTO_SHARE * total:
        return [*lines, _advice(estimator, budget)]
    lines.append(
        f"{format_bytes(total)} were there when the run began: something else took them, or more "
        "is needed than was predicted."
    )
    fitting = suggest_fitting_configs(estimator, budget)
    return [*lines, _advice(estimator, budget) if fitting else _GENERAL]


@contextlib.contextmanager
def explained_memory(estimator: MemoryEstimator, budget: MemoryBudget) -> Iterator[None]:
    """Turns an error of memory into a MemoryShortError that says `out_of_memory_lines`."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise MemoryShortError("\n".join(out_of_memory_lines(error, estimator, budget))) from error


def _advice(estimator: MemoryEstimator, budget: MemoryBudget) -> str:
    variants = suggest_fitting_configs(estimator, budget)
    if not variants:
        more = ", or shard it over more processes" if estimator.world.size > 1 else ""
        if more and shard_count(estimator.config, estimator.world) == 1:
            more += " (distributed.strategy=fsdp)"
        return f"Only a smaller model would fit: lower model.n_layer or model.n_embd{more}."
    words = [
        f"{_overrides(estimator.config, config)} ({format_bytes(memory.required)})"
        for config, memory in variants
    ]
    return "What would fit: " + ", or ".join(words)


def _overrides(config: Config, variant: Config) -> str:
    """Returns the command-line overrides that turn a config into its variant."""
    before, after = config.to_dict(), variant.to_dict()
    return " ".join(
        f"{section}.{key}={str(value).lower()}"
        for section, values in after.items()
        for key, value in values.items()
        if value != before[section][key]
    )


def suggest_fitting_configs(
    estimator: MemoryEstimator, budget: MemoryBudget, count: int = 2
) -> list[tuple[Config, Memory]]:
    """Returns the first variants of the run that fit, with their memory.

    All keep the tokens of a step. The mildest changes come first: smaller micro-batches, sharding
    and recomputation, which only round differently at most; then 4-bit moments, shorter sequences,
    and 4-bit moments with smaller micro-batches.
    """
    config, world_size = estimator.config, estimator.world.size
    low_bit = _with_4bit_moments(config)
    kinds = (
        _smaller_batches(config, world_size),
        _sharded_or_recomputed(config, world_size),
        low_bit,
        _shorter_blocks(config, world_size),
        [smaller for each in low_bit for smaller in _smaller_batches(each, world_size)],
    )
    found = list[tuple[Config, Memory]]()
    for kind in kinds:
        fitting = ((each, estimator.memory(each)) for each in kind)
        first = next((pair for pair in fitting if budget.fits(pair[1])), None)
        # A combination that allows no larger micro-batch only costs precision.
        batches = [micro_batch(each) for each, _ in found]
        if first and not (kind is kinds[-1] and micro_batch(first[0]) in batches):
            found.append(first)
    return found[:count]


def _smaller_batches(config: Config, world_size: int) -> list[Config]:
    block = config.training.block_size
    return [
        _resized(config, world_size, batch, block)
        for batch in divisors_below(micro_batch(config))
        if is_allowed(config, batch)
    ]


def _sharded_or_recomputed(config: Config, world_size: int) -> list[Config]:
    """Returns the config with every other strategy and with recomputation, the fastest first."""
    distributed = replace(config.distributed, strategy="auto")
    training = replace(config.training, recompute="auto")
    either = replace(config, distributed=distributed, training=training)
    return [choice for choice in strategy_choices(either, world_size) if choice != config]


def _shorter_blocks(config: Config, world_size: int) -> list[Config]:
    found, block = [], config.training.block_size
    while block % 2 == 0 and block > MIN_BLOCK:
        block //= 2
        found.append(_resized(config, world_size, micro_batch(config), block))
    return found


def _with_4bit_moments(config: Config) -> list[Config]:
    low = config.low_precision
    if config.optimizer.name != "adamw" or low.use_4bit_optimizer:
        return []
    with contextlib.suppress(ConfigError):  # which sharded runs cannot have
        return [replace(config, low_precision=replace(low, use_4bit_optimizer=True))]
    return []


def _resized(config: Config, world_size: int, batch: int, block: int) -> Config:
    """Returns the config with other micro-batches and the same tokens in a step."""
    training = config.training
    sized = replace(training, batch_size=batch, block_size=block)
    if training.tokens_per_step is None:
        tokens = accumulation_steps(config, world_size) * micro_batch(config) * training.block_size
        sized = replace(sized, gradient_accumulation_steps=tokens // (batch * block))
    return replace(config, training=sized)
