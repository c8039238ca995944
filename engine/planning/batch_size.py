"""Batch sizes that fit: advice where memory is short, and `training.batch_size: auto`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from config import (
    FP8_MULTIPLE,
    Config,
    ConfigError,
    MemoryShortError,
    accumulation_steps,
    micro_batch,
)
from engine.hardware.distributed import World
from engine.hardware.memory import free_bytes, ran_out
from engine.planning.memory import Memory, MemoryBudget, MemoryEstimator
from settings.formatting import format_bytes

AUTO_SHARE = 0.9  # of the free memory that `batch_size: auto` fills
MAX_SEQUENCES = 10**9  # of a step whose divisors `batch_size: auto` tries
MIN_BLOCK = 64  # tokens; shorter sequences are not suggested
_GENERAL = "Lower training.batch_size, and raise gradient_accumulation_steps with it."


def memory_lines(estimator: MemoryEstimator, budget: MemoryBudget) -> list[str]:
    """Returns what a step needs and what there is and, where it does not fit, what would fit."""
    memory, total = estimator.memory(), budget.total
    there = "" if total is None else f" of {format_bytes(total)} there are"
    lines = [f"Memory of a step: {format_bytes(memory.peak)}{there}: {memory.parts()}"]
    if budget.fits(memory) is False:
        lines.append(f"WARNING: it does not fit. {_advice(estimator, budget)}")
    return [*lines, *_saving_lines(estimator, memory, budget)]


def _saving_lines(estimator: MemoryEstimator, memory: Memory, budget: MemoryBudget) -> list[str]:
    """Returns lines about the copy in host memory that a checkpoint is written from."""
    waits = "training will wait while a checkpoint is written"
    if estimator.world.on_cpu:
        short = budget.fits(memory) and budget.fits(memory, copy=True) is False
        return [f"WARNING: no memory for a copy to save from: {waits}"] if short else []
    copy, free = estimator.copy_bytes(memory), free_bytes(torch.device("cpu"))
    copies = estimator.world.local_size if memory.shards > 1 else 1
    if copy == 0 or free is None:
        return []
    line = f"Saving copies {format_bytes(copies * copy)} to the host memory of a machine"
    if copies * copy <= free:
        return [f"{line}, of {format_bytes(free)} free"]
    return [f"WARNING: {line}, and {format_bytes(free)} are free: {waits}"]


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
    lines.append(f"A step needs {format_bytes(memory.peak)}: {memory.parts()}")
    total = memory.peak if budget.total is None else budget.total
    # The step has just failed, so what fits needs clearly less, whatever the prediction says.
    budget = MemoryBudget(0, int(AUTO_SHARE * min(total, memory.required)))
    if memory.peak >= AUTO_SHARE * total:
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
        return "Only a smaller model would fit: lower model.n_layer or model.n_embd."
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

    All keep the tokens of a step. The mildest changes come first: smaller micro-batches, 4-bit
    moments, shorter sequences, and 4-bit moments with smaller micro-batches.
    """
    config, world_size = estimator.config, estimator.world.size
    low_bit = _with_4bit_moments(config)
    kinds = (
        _smaller_batches(config, world_size),
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
        for batch in _divisors_below(micro_batch(config))
        if _is_allowed(config, batch)
    ]


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
    return [replace(config, low_precision=replace(low, use_4bit_optimizer=True))]


def _resized(config: Config, world_size: int, batch: int, block: int) -> Config:
    """Returns the config with other micro-batches and the same tokens in a step."""
    training = config.training
    sized = replace(training, batch_size=batch, block_size=block)
    if training.tokens_per_step is None:
        tokens = accumulation_steps(config, world_size) * micro_batch(config) * training.block_size
        sized = replace(sized, gradient_accumulation_steps=tokens // (batch * block))
    return replace(config, training=sized)


def _divisors_below(number: int) -> list[int]:
    """Returns the divisors of a number without itself, the largest first."""
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    found = {*small, *(number // each for each in small)} - {number}
    return sorted(found, reverse=True)


def _is_allowed(config: Config, batch: int) -> bool:
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
    found = [each for each in (sequences, *_divisors_below(sequences)) if _is_allowed(config, each)]
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
