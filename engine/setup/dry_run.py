"""`--dry-run`: everything is checked, the plan is printed, and its parts are timed here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from config import Config, Request, micro_batch
from data import open_dataset
from data.run_data import RunData, document_id_function, missing_corpus
from data.tokenizers.build import build_tokenizer
from engine.graphed_step import check_graphs
from engine.hardware.distributed import World
from engine.kernels import check_kernels, choose_kernels
from engine.monitor import console
from engine.planning.batch_size import predict_batch_sizes, with_batch
from engine.planning.forecast import BUDGET_S, choose_trial, forecast, measure
from engine.planning.memory import MemoryBudget, MemoryEstimator
from engine.planning.stopwatch import Stopwatch, stopwatch
from engine.planning.summary import (
    cost_lines,
    learning_rate_plot,
    length_lines,
    origin_lines,
    planned_steps,
    planned_tokens,
    ratio_line,
    resolve_vocab_size,
    tokens_line,
)
from engine.precision.precision import Precision
from engine.run_directory.directory import RunDirectory, directory_lines
from engine.setup.build import new_optimizer, open_precision, resolve_auto, wants_compiler
from engine.setup.prompt import sample_writer
from engine.setup.run_setup import EVAL_BATCH, RunSetup, prepare_run
from model import LanguageModel, build_model

BUSY = 0.3  # cores used by others from which on it is said


def dry_run(request: Request, world: World) -> None:
    """Prints the plan and, where asked for, the config; trains nothing, creates nothing."""
    check_graphs(request.config, world)
    check_kernels(request.config, world.device)
    budget = MemoryBudget.of(world)
    missing = missing_corpus(request.config)
    setup = None if missing else prepare_run(request, world)
    config = _with_vocabulary(request.config, missing) if setup is None else setup.config
    done, saved = (setup.done, setup.start.saved) if setup else ((0, 0), {})
    epoch_tokens = setup.epoch_tokens if setup else 0
    steps = planned_steps(config, world.size, epoch_tokens, done)
    config = resolve_auto(config, steps, world, budget)
    precision = open_precision(config, world)
    with torch.device("meta"):
        model = build_model(config)
    covered = precision.prepare(model, steps, init=False)
    kernels = choose_kernels(model, config, world.device)
    optimizer = new_optimizer(model, config)
    before = saved["train"]["compiled"] if saved else None
    wanted = wants_compiler(config, model, steps, world, before)
    estimator = MemoryEstimator(config, model, precision, world, wanted and precision.compiles)
    lines = []
    if config.training.batch_size == "auto":
        sizes, line = predict_batch_sizes(estimator, budget)
        config = with_batch(config, sizes[0], EVAL_BATCH)
        estimator, lines = replace(estimator, config=config), [line]
    if setup is None:
        console.info(*origin_lines(request))
        console.info(
            f"Data: {missing} is missing; the run will build it from the Python standard library"
        )
    else:
        RunData(setup.dataset, config)  # refuses text that is too short
    console.info(*lines, *cost_lines(estimator, budget, optimizer), *covered, *kernels)
    if setup is None:
        console.info(tokens_line(config, world.size))
    else:
        error = setup.dataset.stats.error
        console.info(*length_lines(config, world.size, epoch_tokens, error, done))
        console.info(*setup.source_lines(world))
    tokens = planned_tokens(config, world.size, steps, done)
    console.info(ratio_line(tokens, model), *learning_rate_plot(config, steps))
    directory = RunDirectory.start(config)
    resume = setup.start.resume if setup else None
    console.info(*directory_lines(directory, setup.start.continued if setup else None))
    if request.show_config:
        console.info("", config.to_yaml())
    first = 0 if resume is None else resume.step
    console.info(f"Timing some steps on {world.device_name}, for at most 15 s...")
    console.info(*time_lines(estimator, budget, range(first, max(first, steps)), setup))
    console.info("Dry run: nothing was trained or created.")


def _with_vocabulary(config: Config, missing: Path | None) -> Config:
    """Returns the config with the vocabulary that a run will have which builds its corpus first:
    that of the other texts or of the tokenizer. Characters and weights would have to be read."""
    known = config.model.vocab_size is not None or config.tokenizer.name == "char"
    if known or config.training.init_from not in ("scratch", "resume"):
        return config
    mixture = config.dataset.mixture
    others = tuple(source for source in mixture if Path(source.parquet_dir or "") != missing)
    if others:
        dataset = replace(config.dataset, mixture=others)
        tokenizer = open_dataset(dataset, config.tokenizer).tokenizer
    else:
        tokenizer = build_tokenizer(config.tokenizer)
    return resolve_vocab_size(config, tokenizer.vocab_size, tokenizer.name)[0]


def time_lines(
    estimator: MemoryEstimator, budget: MemoryBudget, span: range, setup: RunSetup | None
) -> Iterator[str]:
    """Yields how long the steps after `span.start` will take, by timing parts of the run on a model
    that is thrown away.

    Nothing is compiled: that alone would take longer than all trials together.
    """
    config, world = estimator.config, estimator.world
    documents = None if setup is None else document_id_function(setup.dataset, config)
    trial = choose_trial(estimator, budget, build_model)
    if not trial.sizes:
        yield "Time: unknown: not even the smallest micro-step fits into memory"
        return
    precision = open_precision(config, world)
    model = build_model(trial.config).to(world.device)
    precision.prepare(model, span.stop)
    optimizer = new_optimizer(model, trial.config)
    with stopwatch(world.device, BUDGET_S) as watch:
        times = measure(model, optimizer, precision, trial, watch, documents)
        if setup is not None and config.training.sample_prompt is not None:
            sample = _sample_s(trial.config, setup, model, precision, watch)
            times = replace(times, sample=sample * trial.flops_ratio)
    found = forecast(config, times, estimator.model, span, world.size)
    note = ", before what compiling takes off" if estimator.compiled else ""
    yield found.line(world.size, ", rough" + note if trial.is_rough(times.tokens) else note)
    whole = micro_batch(config) * config.training.block_size
    timed = [f"Timed on {world.device_name}", precision.name]
    if times.tokens < whole:
        timed.append(f"by {times.tokens:,} of the {whole:,} tokens of a micro-step")
    if trial.config.model.n_layer < config.model.n_layer:
        timed.append(f"by {trial.config.model.n_layer} of {config.model.n_layer} layers")
    if span.start:
        timed.append(f"from step {span.start}")
    yield " | ".join(timed)
    if watch.busy >= BUSY:
        yield (
            f"Other programs use {watch.busy:.1f} of {os.cpu_count()} cores: the time is that of a "
            "machine without them, with them it is longer"
        )


def _sample_s(
    config: Config, setup: RunSetup, model: LanguageModel, precision: Precision, watch: Stopwatch
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
