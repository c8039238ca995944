"""`--dry-run`: everything is checked, the plan is printed, and its parts are timed here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from config import Config, Request, micro_batch
from data.run_data import RunData
from engine.hardware.distributed import World
from engine.kernels import choose_kernels
from engine.monitor import console
from engine.planning.memory import MemoryBudget
from engine.planning.stopwatch import Stopwatch
from engine.planning.summary import (
    cost_lines,
    learning_rate_plot,
    length_lines,
    origin_lines,
    planned_tokens,
    ratio_line,
    tokens_line,
)
from engine.precision.precision import Precision
from engine.run_directory.directory import RunDirectory, directory_lines
from engine.setup.prompt import sample_writer
from engine.setup.run_plan import Plan, plan_run, time_parts
from engine.setup.run_setup import RunSetup
from model import LanguageModel

BUSY = 0.3  # cores used by others from which on it is said


def dry_run(request: Request, world: World) -> None:
    """Prints the plan and, where asked for, the config; trains nothing, creates nothing."""
    budget = MemoryBudget.of(world)
    plan = plan_run(request, world, budget)
    config, setup, model = plan.config, plan.setup, plan.estimator.model
    kernels = choose_kernels(model, config, world.device)
    if setup is None:
        console.info(*origin_lines(request))
        console.info(
            f"Data: {plan.missing} is missing; the run will build it from the Python standard "
            "library"
        )
    else:
        RunData(setup.dataset, config)  # refuses text that is too short
    costs = cost_lines(plan.estimator, budget, plan.optimizer)
    console.info(*plan.batch_lines, *costs, *plan.covered, *kernels)
    done = setup.done if setup else (0, 0)
    if setup is None:
        console.info(tokens_line(config, world.size))
    else:
        error = setup.dataset.stats.error
        console.info(*length_lines(config, world.size, setup.epoch_tokens, error, done))
        console.info(*setup.source_lines(world))
    tokens = planned_tokens(config, world.size, plan.steps, done)
    console.info(ratio_line(tokens, model), *learning_rate_plot(config, plan.steps))
    directory = RunDirectory.start(config)
    console.info(*directory_lines(directory, setup.start.continued if setup else None))
    if request.show_config:
        console.info("", config.to_yaml())
    console.info(f"Timing some steps on {world.device_name}, for at most 15 s...")
    console.info(*time_lines(plan, budget))
    console.info("Dry run: nothing was trained or created.")


def time_lines(plan: Plan, budget: MemoryBudget) -> Iterator[str]:
    """Yields how long the run will take, by timing parts of it."""
    config, world, sample = plan.config, plan.estimator.world, None
    if plan.setup is not None and config.training.sample_prompt is not None:
        sample = partial(_sample_s, plan.setup)
    timed = time_parts(plan, budget, sample=sample)
    if timed is None:
        yield "Time: unknown: not even the smallest micro-step fits into memory"
        return
    times, trial = timed.times, timed.trial
    note = ", before what compiling takes off" if plan.estimator.compiled else ""
    rough = ", rough" if trial.is_rough(times.tokens) else ""
    yield timed.forecast(plan).line(world.size, rough + note)
    whole = micro_batch(config) * config.training.block_size
    words = [f"Timed on {world.device_name}", timed.precision]
    if times.tokens < whole:
        words.append(f"by {times.tokens:,} of the {whole:,} tokens of a micro-step")
    if trial.config.model.n_layer < config.model.n_layer:
        words.append(f"by {trial.config.model.n_layer} of {config.model.n_layer} layers")
    if plan.span.start:
        words.append(f"from step {plan.span.start}")
    yield " | ".join(words)
    if timed.busy >= BUSY:
        yield (
            f"Other programs use {timed.busy:.1f} of {os.cpu_count()} cores: the time is that of a "
            "machine without them, with them it is longer"
        )


def _sample_s(
    setup: RunSetup, config: Config, model: LanguageModel, precision: Precision, watch: Stopwatch
) -> float:
    """Returns the seconds of continuing `training.sample_prompt`, from those of a few tokens."""
    wanted, few = config.training.sample_tokens, min(8, config.training.sample_tokens)
    took = []
    for count in (1, few):
        short = replace(config, training=replace(config.training, sample_tokens=count))
        write = sample_writer(model, short, precision, setup.dataset.tokenizer)
        assert write is not None
        took.append(watch.once(write))
    first, all_of_them = took
    return first + (wanted - 1) * max(0.0, all_of_them - first) / max(1, few - 1)
